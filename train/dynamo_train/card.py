"""The model card: what a checkpoint was trained on, and how good its heads are on text it never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from dynamo_model import MultiTokenModel, has_drafter
from dynamo_runtime.corpus import STANDARD_LIBRARY
from dynamo_runtime.files import write_whole

from .corpus import PACKAGE, held_out_documents
from .parallel import ModifiedCLM
from .pipeline import BASE, CARD_FILE, FIGURES_FILE, read_record
from .registry import DRAFTERS
from .tokens import validation_batches

_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 64, 64, 96


def measure(checkpoint: Path, source: str, held_out_percent: float) -> dict[str, float]:
    """Measure a multi-token checkpoint on the held-out part of a corpus.

    Returns:
        `ppl_1` …, `ppl_1:2` … (papers' definitions), and from greedy continuations of held-out prompts, for
        every further head: `agreement_i`, the share of positions where its first choice is what the base
        writes i tokens on, and `accepted_i`, the same where all heads before it agreed too; with a draft vocabulary
        `coverage` besides.  A conditioned head is told what the base wrote.
    """
    model = MultiTokenModel.load(checkpoint)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    end_id = model.config.eos_token_id
    ids = [
        [*tokenizer.encode(document.text, add_special_tokens=False).ids, end_id]
        for document in held_out_documents(source, held_out_percent)
    ]
    stream = torch.tensor([token for document in ids for token in document]).numpy()
    length = model.config.max_position_embeddings
    batches = validation_batches(stream, sequences=4, length=length, extra=model.n_heads)
    figures = ModifiedCLM(model).validate(batches)
    starts = torch.linspace(0, len(stream) - _PROMPT_TOKENS, _PROMPTS).long().tolist()
    prompts = torch.stack([torch.from_numpy(stream[s : s + _PROMPT_TOKENS]) for s in starts])
    return figures | greedy_agreement(model, prompts, _NEW_TOKENS)


@torch.no_grad()
def greedy_agreement(model: MultiTokenModel, prompts: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """Return how often the further heads' first choice is what the base itself writes, greedily continued.

    Args:
        model: The multi-token model.
        prompts: Token ids [prompts, length].
        new_tokens: Tokens the base writes behind each prompt (end-of-text does not stop it).
    """
    base: Any = model.base
    written = base.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )
    choices = torch.stack([logits.argmax(-1) for logits in model(written)])  # [n_heads, prompts, positions]
    first = prompts.shape[1] - 1
    positions = written.shape[1] - first - model.n_heads
    agrees = torch.stack(
        [
            choices[i, :, first : first + positions] == written[:, first + i + 1 : first + i + 1 + positions]
            for i in range(model.n_heads)
        ]
    )
    figures = {}
    for i in range(1, model.n_heads):
        before = agrees[1:i].all(0)  # the first head wrote the text, so it always agrees
        figures[f"agreement_{i + 1}"] = agrees[i].float().mean().item()
        figures[f"accepted_{i + 1}"] = agrees[i][before].float().mean().item()
    return figures


def write_card(checkpoint: Path, source: str, held_out_percent: float) -> None:
    """Measure a checkpoint and write its card and `figures.json` into its folder."""
    figures = measure(checkpoint, source, held_out_percent)
    write_whole(checkpoint / FIGURES_FILE, json.dumps(figures, indent=2) + "\n")
    write_whole(checkpoint / CARD_FILE, card_text(checkpoint, figures))


def card_text(checkpoint: Path, figures: dict[str, float]) -> str:
    """Return the card of a checkpoint, from its own record and what `measure` found."""
    config = json.loads((checkpoint / "config.json").read_text())
    n_heads = max(int(name.removeprefix("agreement_")) for name in figures if name.startswith("agreement_"))
    size = sum(path.stat().st_size for path in checkpoint.iterdir() if path.name != CARD_FILE) / 1e6
    lines = [
        f"# DynaMo T{n_heads}: a small multi-token model of Python source code",
        "",
        f"A {config['model_type']} decoder of {config['num_hidden_layers']} layers, width {config['hidden_size']}, "
        f"vocabulary {config['vocab_size']}, context {config['max_position_embeddings']}, with {n_heads - 1} further "
        f"token heads of one layer each; {size:.1f} MB in this folder. `dynamo-train default` rebuilds it.",
        "",
        "It completes Python in the style of the standard library. It knows little else and it is small: use it to "
        "try the tools, not to write programs.",
        "",
        "## Training",
        "",
        *_training(checkpoint),
        "",
        "## Figures on the held-out modules",
        "",
        "| figure | value |",
        "|---|---|",
    ]
    if (covered := figures.get("coverage")) is not None:
        lines.append(f"| labels in the draft vocabulary; a further head's PPL is over those alone | {covered:.1%} |")
    lines += [f"| {_ppl(name)} | {value:.2f} |" for name, value in figures.items() if "ppl" in name]
    for i in range(2, n_heads + 1):
        lines.append(f"| head {i}: first choice is what the base writes, greedily | {figures[f'agreement_{i}']:.1%} |")
        lines.append(f"| … where all heads before it agreed | {figures[f'accepted_{i}']:.1%} |")
    return "\n".join(lines) + "\n"


def _training(checkpoint: Path) -> list[str]:
    """Return a line for every text that was trained on, and one for every stage of which something is in the folder."""
    record = read_record(checkpoint)
    titles, lines = {}, {}
    if BASE in record:
        titles[BASE], lines[BASE] = "Base", f"{_run(record[BASE])}, from scratch"
    for name, command in DRAFTERS.items():
        drafter = command.load()
        if name in record and has_drafter(checkpoint, drafter.model.kind):
            stage = record[name]
            titles[name] = drafter.title
            lines[name] = drafter.card_line(stage, _runs(stage), _held_out(stage["figures"]))
    texts: dict[str, list[str]] = {}
    for name, title in titles.items():
        texts.setdefault(_text(record[name]), []).append(title)
    several = len(texts) > 1
    of_texts = [f"- Text{' of ' + ', '.join(of) if several else ''}: {text}." for text, of in texts.items()]
    return of_texts + [f"- {titles[name]}: {line}." for name, line in lines.items()]


def _text(stage: dict[str, Any]) -> str:
    """Return what a stage was trained on, and what of it was held out."""
    corpus = stage["corpus"]
    if "shards" in corpus:
        return (
            f"`{corpus['source']}`, {corpus['shards']} shards, streamed (SHA-256 of their names and sizes "
            f"`{corpus['sha256'][:16]}…`); {corpus['held_out_percent']:g} % of the documents are held out by the hash "
            "of their text"
        )
    parts = corpus["source"].split("+")
    packages = [f"`{part.removeprefix(PACKAGE)}`" for part in parts if part.startswith(PACKAGE)]
    names = [f"the standard library of Python {stage['python']}"] if STANDARD_LIBRARY in parts else []
    names += [f"the package{'s' if len(packages) > 1 else ''} {', '.join(packages)}"] if packages else []
    names += [f"`{part}`" for part in parts if part != STANDARD_LIBRARY and not part.startswith(PACKAGE)]
    return (
        f"{corpus['documents']} modules of {' and '.join(names)}, without tests and generated tables "
        f"({corpus['characters'] / 1e6:.1f} M characters, SHA-256 `{corpus['sha256'][:16]}…`); "
        f"{corpus['held_out_documents']} of them ({corpus['held_out_tokens']:,} of "
        f"{corpus['held_out_tokens'] + corpus['train_tokens']:,} tokens) are held out by the hash of their "
        "top-level name"
    )


def _held_out(figures: dict[str, float]) -> str:
    return "held out: " + ", ".join(f"{_ppl(name)} {value:.2f}" for name, value in figures.items() if "ppl" in name)


def _ppl(name: str) -> str:
    return name.upper().replace("PPL_", "PPL ")


def _runs(stage: dict[str, Any]) -> str:
    """Return how a drafter was trained, and before that, if it went on from one that was there."""
    frozen = "base frozen" if stage["recipe"]["freeze_base"] else "base trained along"
    run = f"{_run(stage)}, {frozen}"
    return f"{run}; before that {_runs(stage['before'])}" if "before" in stage else run


def _run(stage: dict[str, Any]) -> str:
    recipe, steps = stage["recipe"], stage["steps"]
    tokens = steps * recipe["sequences"] * recipe["length"]
    known = stage["corpus"].get("train_tokens")
    read = f"{tokens / known:.1f} epochs" if known else f"{tokens / 1e6:.1f} M tokens"
    early = "" if steps == recipe["steps"] else f", stopped early of {recipe['steps']:,}"
    return (
        f"{steps:,} steps{early}, of {recipe['sequences']} × {recipe['length']} tokens ({read}), "
        f"{recipe['optimizer']}, {recipe['precision']} autocast"
    )
