"""The bundle: the folder that crosses from host to device, described by its manifest."""

import hashlib
import logging
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import verified
from .cache import bundles_folder
from .errors import BundleError, shown
from .files import CONFIG, SPECIAL_TOKENS, TEMPLATE, lies_in, recover, recover_below, sha256
from .manifest import MANIFEST, FileRecord, Manifest, read_manifest
from .parameters import SamplingParameters, resolve_parameters
from .shipped import outdated
from .wire import external_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .chat import ChatTemplate
    from .control import ControlTokens
    from .cooccurrence import Cooccurrence

TOKENIZER, COUNTS = "tokenizer.json", "cooccurrence.npz"
DEFAULT_BUNDLE = Path(__file__).parent / "default"
"""The bundle that ships with the package: a small model of Python source code, in int8."""
log = logging.getLogger("dynamo_runtime")


@dataclass(frozen=True, kw_only=True)
class Bundle(Manifest):
    """A bundle on disk: what its manifest says (or, before there is one, whoever builds it in memory), and where it is.

    Attributes:
        folder: Where the files lie.
    """

    folder: Path

    @property
    def look_ahead(self) -> range:
        """Ids of the look-ahead tokens, which follow the vocabulary's; empty where there are none."""
        return range(self.vocab_size, self.vocab_size + self.topology.look_ahead)

    @property
    def lossless(self) -> bool:
        """Whether passes over several tokens say what passes over one say, as verified decoding relies on."""
        return self.quantization is None or self.quantization.lossless

    @property
    def degraded(self) -> bool:
        """Whether the bundle was written although it failed a gate."""
        return self.quantization is not None and self.quantization.degraded

    @property
    def base_layers(self) -> int:
        """Attention layers of the base; in formats 2 and 3 those of further heads come behind them in its graph."""
        return self.kv_layers - (self.topology.layers if self.drafter is None else 0)

    @property
    def graphs(self) -> list[str]:
        """File names of its graphs."""
        return [self.graph] if self.drafter is None else [self.graph, self.drafter.graph]

    @property
    def graph_path(self) -> Path:
        """The ONNX file."""
        return self.folder / self.graph

    @property
    def graph_bytes(self) -> int:
        """Bytes of graphs and weights on disk, by the manifest."""
        return sum(record.bytes for name, record in self.files.items() if name.startswith(tuple(self.graphs)))

    @property
    def graph_sha256(self) -> str:
        """Of the graph, by the manifest, and of both if there are two; empty where there is none."""
        found = [record.sha256 for name in self.graphs if (record := self.files.get(name))]
        return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest() if found else ""

    @property
    def has_cooccurrence(self) -> bool:
        """Whether n-gram counts came with the bundle."""
        return (self.folder / COUNTS).is_file()

    @cached_property
    def cooccurrence(self) -> "Cooccurrence":
        """The n-gram counts, read on first use.

        Raises:
            BundleError: There are none, or they belong to another vocabulary.
        """
        from .cooccurrence import load_cooccurrence

        return load_cooccurrence(self.folder / COUNTS, vocab_size=self.vocab_size)

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer, read on first use, without truncation or padding.

        Raises:
            BundleError: It is absent, unreadable, or has tokens the graph does not know.
        """
        from .tokenizer import read_tokenizer

        path = self.folder / TOKENIZER
        tokenizer = read_tokenizer(path)
        # Tokens added to it that the graph has no row for are refused where a prompt has one.
        largest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
        if largest >= self.vocab_size:
            raise BundleError(
                f"{path} does not belong to this graph: it has token {largest}, "
                f"the graph's vocabulary ends at {self.vocab_size - 1}"
            )
        expected = self.tokenizer_size
        if expected is not None and expected != tokenizer.get_vocab_size():
            raise BundleError(
                f"{path} does not belong to this graph: it has {tokenizer.get_vocab_size()} tokens "
                f"where the bundle was exported with {expected}"
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def control_tokens(self) -> "ControlTokens":
        """The tokenizer's special tokens, and those that end a text."""
        from .control import ControlTokens

        return ControlTokens(self.tokenizer, self.eos_token_ids)

    @property
    def has_chat_template(self) -> bool:
        """Whether a chat template came with the bundle."""
        from .chat import has_template

        return has_template(self.folder)

    @cached_property
    def chat_template(self) -> "ChatTemplate":
        """How messages are put to the model.

        Raises:
            BundleError: It has no chat template.
        """
        from .chat import read_template

        ends = [("bos_token", self.bos_token_id), *(("eos_token", token) for token in self.eos_token_ids[:1])]
        texts = {name: self.tokenizer.id_to_token(token) for name, token in ends if token is not None}
        return read_template(self.folder, {name: text for name, text in texts.items() if text is not None})

    def parameters(
        self, given: Mapping[str, Any] | None = None, defaults: Mapping[str, Any] | SamplingParameters | None = None
    ) -> SamplingParameters:
        """Return sampling parameters for this bundle: see `resolve_parameters`.

        Args:
            given: What the caller named.
            defaults: In place of the bundle's own.

        Raises:
            ParameterError: A name is unknown, or a value is out of range.
        """
        known = self.sampling if defaults is None else defaults
        conditioned = self.drafter is not None and self.drafter.conditioned
        return resolve_parameters(known, given or {}, has_counts=self.has_cooccurrence, conditioned=conditioned)

    def write_manifest(self) -> None:
        """Write what this says into the bundle's folder."""
        (self.folder / MANIFEST).write_text(self.to_json(), encoding="utf-8")


def load_bundle(path: str | Path, verify: bool = False) -> Bundle:
    """Read a bundle's manifest and check that its files are all there and whole.

    A bundle that goes by a model's name and has another drafter than the one that ships for it now is warned of.

    Args:
        path: The folder, or the ONNX file inside it; or the name of a model that was exported into the cache.
        verify: Compare the sha256 of every file, and that of the manifest if it has one. Otherwise sizes are compared,
            and sha256 only of files that were never verified, or have changed since.

    Raises:
        BundleError: Something is missing, truncated, changed or not understood; the message names it.
    """
    if not isinstance(path, str | os.PathLike):
        raise BundleError(f"a bundle is named by its path, not by a {type(path).__name__}")
    name = str(path) if _is_name(path) else None
    path = Path(path) if name is None else _named(name)
    if not os.path.exists(path):
        recover(path)
        recover(path.parent)
    if not os.path.exists(path):  # which says no to what is too long for a path
        raise BundleError(f"{path} does not exist")
    folder = path if path.is_dir() else path.parent
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} is not a bundle, or only half of one: it has no {MANIFEST}")
    manifest = read_manifest(folder / MANIFEST, verify)
    if not path.is_dir() and path.name != manifest.graph:
        raise BundleError(f"{path} is not the graph of the bundle in {folder}: that is {manifest.graph}")
    for graph in [manifest.graph, *([] if manifest.drafter is None else [manifest.drafter.graph])]:
        if graph not in manifest.files:
            raise BundleError(f"{folder / MANIFEST} does not list its own graph {graph}")
    check_files(folder, manifest, verify)
    if name is not None and (told := outdated(name, manifest)):
        log.warning("%s", told)
    return Bundle(folder=folder, **{each.name: getattr(manifest, each.name) for each in fields(Manifest)})


def _is_name(path: str | Path) -> bool:
    """Tell whether this can only be the name of a model: a plain word, and nothing of that name is here."""
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", str(path))) and not os.path.exists(path)


def _named(name: str) -> Path:
    """Return the newest bundle of a model in the cache.

    Raises:
        BundleError: There is none.
    """
    recover_below(bundles_folder() / name)
    found = list(bundles_folder().glob(f"{name}/*/{MANIFEST}"))
    if not found:
        raise BundleError(
            f"{name} does not exist, and the cache has no bundle of that name: "
            f"`dynamo-export -m {name} --quantize int8` makes one, for the models it knows"
        )
    return max(found, key=lambda manifest: manifest.stat().st_mtime).parent


def check_files(folder: Path, manifest: Manifest, verify: bool) -> None:
    """Compare files with what the manifest says of them.

    Args:
        folder: Where they lie.
        manifest: Of the bundle.
        verify: Whether to read those too that were found to be whole before and have not changed since.

    Raises:
        BundleError: One is missing, another, or not listed.
    """
    for name in (TOKENIZER, COUNTS, TEMPLATE, CONFIG, SPECIAL_TOKENS):
        if name not in manifest.files and (folder / name).exists():
            raise BundleError(f"{folder / name} would be read, and {MANIFEST} does not list it: take it out of there")
    known = {} if verify else verified.recall(folder)
    states = {}
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{path} is missing: the bundle is incomplete, copy it again")
        state = states[name] = verified.state(path, record.sha256)
        if state[0] != record.bytes:
            raise BundleError(
                f"{path} has {state[0]} bytes where the manifest says {record.bytes}: "
                "truncated or changed, copy it again"
            )
        if not record.sha256 and verify:
            raise BundleError(f"{path} cannot be verified: {MANIFEST} does not give its sha256")
        if not record.sha256 and not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"{path} is a link out of the bundle, and {MANIFEST} does not give its sha256")
        if record.sha256 and known.get(name) != state and sha256(path) != record.sha256:
            raise BundleError(f"{path} does not have the sha256 in the manifest: changed, copy it again")
    if known != states:
        for graph in [manifest.graph, *([] if manifest.drafter is None else [manifest.drafter.graph])]:
            _check_weights(folder, graph, manifest)
        verified.remember(folder, states)


def _check_weights(folder: Path, graph: str, manifest: Manifest) -> None:
    """Find out before onnxruntime does which further files a graph is in.

    Raises:
        BundleError: One is not listed, or lies outside the folder; or the graph is none.
    """
    path = folder / graph
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            names = external_files(data)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} does not load: it is not an ONNX file: {error}") from error
    for name in names:
        if name not in manifest.files:
            raise BundleError(f"{path} has weights in {shown(name)}, which {MANIFEST} does not list")
        if not lies_in(folder, name):
            raise BundleError(f"{path} has weights in {name}, which lies outside the bundle's folder")


def list_files(folder: Path) -> dict[str, FileRecord]:
    """Return what a manifest says of the files in a folder, itself left out."""
    return {
        path.name: FileRecord(path.stat().st_size, sha256(path))
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
