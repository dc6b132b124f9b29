"""The bundle: the folder that crosses from host to device, and its manifest `dynamo_config.json`."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .errors import BundleError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .cooccurrence import Cooccurrence

MANIFEST = "dynamo_config.json"
FORMAT_VERSION = 2
COUNTS = "cooccurrence.npz"
DEFAULT_BUNDLE = Path(__file__).parent / "default"
"""The bundle that ships with the package: a small model of Python source code, in int8."""
KINDS = ("plain", "parallel", "cp", "lookahead")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, described by its manifest (or, before there is one, by whoever builds it in memory).

    Attributes:
        folder: Where the files lie.
        n_heads: Token heads of the graph; 1 where further tokens do not come from heads of their own.
        vocab_size: V, the last axis of `logits`.
        context_length: Positions the model was built for, an upper bound of every cache.
        kv_layers: KV caches of the graph: stem, first head, further heads, numbered in that order.
        kv_heads: Key/value heads per layer.
        head_size: Width of one key/value head.
        graph: File name of the ONNX graph inside `folder`.
        kind: "plain", or how further tokens are predicted: "parallel" token heads, a joint "cp" head, or
            "lookahead" embeddings.
        n_tokens: Tokens one pass predicts: n_heads, n of the joint head, or one more than look-ahead embeddings.
        rank: Components of the joint head, else 0.
        top_k_outputs: K, the last axis of the `topk_*` outputs.
        eos_token_ids: Tokens that end a text.
        sampling: Sampling defaults by field name (see `SamplingParameters`).
        files: What the manifest says of every file: name -> {"bytes", "sha256"}.
        manifest: The manifest as read, for whatever has no attribute here.
    """

    folder: Path
    n_heads: int
    vocab_size: int
    context_length: int
    kv_layers: int
    kv_heads: int
    head_size: int
    graph: str = "model.onnx"
    kind: str = "parallel"
    n_tokens: int = 0
    rank: int = 0
    model_type: str = ""
    precision: str = "fp32"
    top_k_outputs: int = 128
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Fill in what follows from the number of heads."""
        if not self.n_tokens:
            object.__setattr__(self, "n_tokens", self.n_heads)

    @property
    def look_ahead(self) -> range:
        """Ids of the look-ahead tokens, which follow the vocabulary's; empty for other kinds."""
        return range(self.vocab_size, self.vocab_size + (self.n_tokens - 1 if self.kind == "lookahead" else 0))

    @property
    def lossless(self) -> bool:
        """Whether passes over several tokens say what passes over one say, as verified decoding relies on."""
        return bool(self.manifest.get("quantization", {}).get("lossless", True))

    @property
    def degraded(self) -> bool:
        """Whether the bundle was written although it failed a gate."""
        return bool(self.manifest.get("quantization", {}).get("degraded", False))

    @property
    def has_head_rows(self) -> bool:
        """Whether the graph has heads whose rows are chosen apart from the first head's."""
        return self.kind in ("parallel", "cp")

    @property
    def head_layers(self) -> range:
        """Numbers of the attention layers that only further heads need; they come last."""
        count = self.n_heads - 1 + (self.kind == "cp")
        return range(self.kv_layers - count, self.kv_layers)

    @property
    def graph_path(self) -> Path:
        """The ONNX file."""
        return self.folder / self.graph

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
        from tokenizers import Tokenizer

        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise BundleError(f"{path} is missing: this bundle cannot turn text into tokens")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleError(f"{path} is not a readable tokenizer: {error}") from error
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= self.vocab_size:
            raise BundleError(
                f"{path} does not belong to this graph: it has token {largest}, "
                f"the graph's vocabulary ends at {self.vocab_size - 1}"
            )
        expected = self.manifest.get("tokenizer_size")
        if expected is not None and expected != tokenizer.get_vocab_size():
            raise BundleError(
                f"{path} does not belong to this graph: it has {tokenizer.get_vocab_size()} tokens "
                f"where the bundle was exported with {expected}"
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def load_bundle(path: str | Path, verify: bool = False) -> Bundle:
    """Read a bundle's manifest and check that its files are all there and whole.

    Args:
        path: The folder, or the ONNX file inside it.
        verify: Also compare every file's sha256; sizes are compared at every load.

    Raises:
        BundleError: Something is missing, truncated, changed or not understood; the message names it.
    """
    path = Path(path)
    if not path.exists():
        raise BundleError(f"{path} does not exist")
    folder = path if path.is_dir() else path.parent
    bundle = _from_manifest(folder)
    if not path.is_dir() and path.name != bundle.graph:
        raise BundleError(f"{path} is not the graph of the bundle in {folder}: that is {bundle.graph}")
    for name, entry in bundle.files.items():
        _check_file(folder, name, entry, verify)
    if bundle.graph not in bundle.files:
        raise BundleError(f"{folder / MANIFEST} does not list its own graph {bundle.graph}")
    return bundle


def _from_manifest(folder: Path) -> Bundle:
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle, or only half of one: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is not readable: {error}") from error
    if not isinstance(manifest, dict):
        raise BundleError(f"{path} is not a JSON object")
    read = _Fields(path, manifest)
    version = read.integer("format_version", 1)
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {version}; this program reads version {FORMAT_VERSION}: export the bundle again"
        )
    n_heads = read.integer("n_heads", 1)
    kind = read.get("kind", str)
    if kind not in KINDS:
        raise BundleError(f"{path}: kind {kind!r} is not one of {', '.join(KINDS)}")
    if (kind == "parallel") != (n_heads > 1):
        raise BundleError(f"{path}: a {kind} bundle cannot have {n_heads} heads")
    has_drafter = kind in ("cp", "lookahead")
    bundle = Bundle(
        folder=folder,
        graph=read.get("graph", str, "model.onnx"),
        kind=kind,
        n_heads=n_heads,
        n_tokens=read.integer("n_tokens", 2) if has_drafter else n_heads,
        rank=read.integer("rank", 1) if kind == "cp" else 0,
        model_type=read.get("model_type", str, ""),
        vocab_size=read.integer("vocab_size", 1),
        context_length=read.integer("context_length", 1),
        kv_layers=read.integer("kv_layers", n_heads),
        kv_heads=read.integer("kv_heads", 1),
        head_size=read.integer("head_size", 1),
        precision=read.get("precision", str, "fp32"),
        top_k_outputs=read.integer("top_k_outputs", 1),
        bos_token_id=manifest.get("bos_token_id"),
        eos_token_ids=tuple(read.get("eos_token_ids", list, [])),
        sampling=read.get("sampling", dict, {}),
        files=read.get("files", dict),
        manifest=manifest,
    )
    special = [*bundle.eos_token_ids, *([] if bundle.bos_token_id is None else [bundle.bos_token_id])]
    if not all(isinstance(i, int) and 0 <= i < bundle.vocab_size for i in special):
        raise BundleError(f"{path}: bos or eos token outside the vocabulary of {bundle.vocab_size}")
    if bundle.top_k_outputs > bundle.vocab_size:
        raise BundleError(f"{path}: top_k_outputs {bundle.top_k_outputs} exceeds vocab_size {bundle.vocab_size}")
    return bundle


class _Fields:
    """Typed access to a manifest whose every complaint names the file and the field."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path, self.values = path, values

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(name, default)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise BundleError(f"{self.path}: field {name!r} is missing or not a {kind.__name__}")
        return value

    def integer(self, name: str, least: int) -> int:
        value: int = self.get(name, int)
        if value < least:
            raise BundleError(f"{self.path}: field {name!r} is {value}, less than {least}")
        return value


def _check_file(folder: Path, name: str, entry: Any, verify: bool) -> None:
    # A manifest may come from anywhere: it must not make us read outside its folder.
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or re.match(r"^[A-Za-z]:", name):
        raise BundleError(f"{folder / MANIFEST} lists a file outside its folder: {name}")
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int):
        raise BundleError(f"{folder / MANIFEST} does not give the size of {name}")
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{path} is missing: the bundle is incomplete, copy it again")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise BundleError(
            f"{path} has {size} bytes where the manifest says {entry['bytes']}: truncated or changed, copy it again"
        )
    if verify and sha256(path) != entry.get("sha256"):
        raise BundleError(f"{path} does not have the sha256 in the manifest: changed, copy it again")


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read in chunks."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    return digest.hexdigest()
