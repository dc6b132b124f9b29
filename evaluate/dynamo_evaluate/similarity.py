"""MAUVE: how much the texts of a setting look like plain decoding's, as a whole (Pillutla et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dynamo_runtime.manifest import MANIFEST
from dynamo_runtime.names import PENULTIMATE
from dynamo_runtime.providers import Backend
from dynamo_runtime.session import Session
from dynamo_runtime.step import NONE

from .cells import MAUVE, Cells
from .errors import EvaluationError
from .generate import Conversations
from .results import Results
from .settings import PLAIN

Features = Callable[[str], np.ndarray]
"""A text's features, [size]."""


def features_of(source: str, backend: Backend) -> Features:
    """Return features of the last token of a text.

    Args:
        source: A bundle with parallel or joint heads, whose penultimate states are taken (the input of the last
            layer), or a folder of a Hugging Face model, whose last hidden states are taken; then torch is needed.
        backend: Of the bundle.

    Raises:
        DynamoError: It is neither, or does not load.
    """
    path = Path(source)
    if (path / MANIFEST).is_file() or path.suffix == ".onnx":
        return _bundle_features(path, backend)
    if (path / "config.json").is_file():
        return _model_features(path)
    raise EvaluationError(f"{source} is neither a bundle nor a folder of a Hugging Face model")


def _bundle_features(path: Path, backend: Backend) -> Features:
    from dynamo_runtime.bundle import load_bundle

    bundle = load_bundle(path)
    session = Session(bundle, backend)
    if session.cache.states is None:
        raise EvaluationError(
            f"{path} puts out no states ({PENULTIMATE}): give a bundle with heads, or a model's folder"
        )

    def features(text: str) -> np.ndarray:
        tokens = bundle.tokenizer.encode(text).ids[-session.max_length :]
        session.cache.reset()
        session.step(tokens, heads=NONE)
        assert session.cache.states is not None
        state: np.ndarray = session.cache.states[session.cache.length - 1]
        return state.astype(np.float32)

    return features


def _model_features(path: Path) -> Features:
    try:
        import torch
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise EvaluationError(
            "features of a model's folder need torch and transformers: pip install 'dynamo-edge[export]'"
        ) from None
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    model = AutoModel.from_pretrained(path, trust_remote_code=False).eval()
    most = getattr(model.config, "max_position_embeddings", None)

    def features(text: str) -> np.ndarray:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            states = model(ids[:, -most:] if most else ids).last_hidden_state
        state: np.ndarray = states[0, -1].float().numpy()
        return state

    return features


def mauve_score(texts: np.ndarray, reference: np.ndarray) -> float:
    """MAUVE of two sets of features, both [texts, size], by the authors' library; 1 is no difference to be seen.

    Raises:
        EvaluationError: The library is not there.
    """
    try:
        from mauve import compute_mauve
    except ImportError:
        raise EvaluationError("MAUVE needs its library: pip install 'dynamo-edge[mauve]'") from None
    return float(compute_mauve(p_features=texts, q_features=reference, verbose=False).mauve)


def judge(results: Results, features: Features, source: str, settings: Iterable[str]) -> None:
    """Add MAUVE of every setting and seed: its texts at this seed against plain decoding's at all other seeds.

    Plain decoding itself is judged in the same way, so what it reaches is what "no difference" looks like with so few
    texts.

    Args:
        results: Of generations; they grow by a record for every setting and seed, unless there is one of as many texts.
        features: Of prompt and continuation together.
        source: What the features are of.
        settings: Names of those that are judged; plain always is.

    Raises:
        EvaluationError: The library is not there, or the results were judged with other features.
    """
    others = {record["features"] for record in results.of(MAUVE)} - {source}
    if others:
        raise EvaluationError(f"{results.path} has MAUVE by features of {others.pop()}: judge a copy, two do not mix")
    cells = Cells(results)
    count = len(cells.units)
    done = results.done(MAUVE, lambda record: (record["setting"], record["seed"], record["texts"]))
    names = [name for name in cells.settings if name == PLAIN or name in set(settings)]
    wanted = [(name, seed) for name in names for seed in range(cells.seeds) if (name, seed, count) not in done]
    if not wanted:
        return
    conversations = Conversations(results)
    texts = {
        (name, seed): [
            conversations.beginning(prompt) + (conversations.continuation(name, prompt, seed, turn) or "")
            for prompt, turn in cells.units
        ]
        for name in {PLAIN, *(name for name, _ in wanted)}
        for seed in range(cells.seeds)
    }
    distinct = sorted({text for each in texts.values() for text in each})
    known = {text: features(text) for text in tqdm(distinct, desc="features", disable=None)}

    def at(setting: str, seeds: Iterable[int]) -> np.ndarray:
        return np.stack([known[text] for seed in seeds for text in texts[setting, seed]])

    for name, seed in tqdm(wanted, desc="MAUVE", disable=None):
        rest = [other for other in range(cells.seeds) if other != seed]
        value = round(mauve_score(at(name, [seed]), at(PLAIN, rest)), 6)
        record = {"setting": name, "seed": seed, "texts": count, "features": source, "value": value}
        results.append({"kind": MAUVE, **record})
