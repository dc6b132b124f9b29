"""The manifest `dynamo_config.json`: what a device has to know of a bundle, as one typed record.

Its table of fields is in docs/bundle.md. What proves a bundle (parity rows, gates) is in `report.json` beside it, which
a device never reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import BundleError, ParameterError, shown
from .fields import MOST_ENTRIES, Fields
from .files import read_object
from .parameters import check_defaults
from .registry import TOPOLOGIES
from .topology import Plain, Topology

MANIFEST = "dynamo_config.json"
REPORT = "report.json"
FORMAT_VERSION = 4
READABLE_VERSIONS = (2, 3, 4)

# Far beyond any model there is, and small enough that nothing made of them hurts.
_MOST_BYTES = 1 << 20  # of the manifest itself
_MOST_TOKENS = 1 << 24  # in a vocabulary
_MOST_POSITIONS = 1 << 27
_MOST_LAYERS = _MOST_KV_HEADS = 4096
_MOST_HEAD_SIZE = 1 << 14
_MOST_POSITION_BYTES = 64 << 20  # of keys and values, in fp32
_MOST_AHEAD = 1024  # heads, tokens, ranks
_MOST_FILE_BYTES = 1 << 50
_MOST_NAME_BYTES = 255


@dataclass(frozen=True)
class FileRecord:
    """One file of a bundle: its size, and the SHA-256 of its content as hex digits."""

    bytes: int
    sha256: str = ""


@dataclass(frozen=True)
class PassBytes:
    """Bytes of weights that a pass reads: without further heads, and for those besides."""

    plain: int
    heads: int = 0


@dataclass(frozen=True)
class DrafterGraph:
    """The graph of what predicts further tokens, which is run apart from the base's.

    Attributes:
        graph: File name of the ONNX graph.
        kv_layers: KV caches of the graph, of one layer each or of several side by side.
        kv_heads: Key/value heads in each; as wide as the base's.
        top_k_outputs: K, the last axis of its `topk_*` outputs.
        conditioned: Whether a head is told the token in front of what it predicts.
        vocabulary: Ids of the tokens that drafts are made of; None for all there are.
    """

    graph: str
    kv_layers: int
    kv_heads: int
    top_k_outputs: int
    conditioned: bool = False
    vocabulary: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Quantization:
    """How a bundle was made smaller.

    Attributes:
        scheme: Its name.
        parts: What the weights of every part are stored as.
        kv_cache: Type of keys and values.
        calibration: Text that numbers were found with, and its tokens; None if there was none.
        lossless: Whether passes over several tokens say what passes over one say, as verified decoding relies on.
        degraded: Whether it was written although it failed a gate.
        versions: Of what made it.
    """

    scheme: str
    parts: Mapping[str, list[str]] = field(default_factory=dict)
    kv_cache: str = "fp32"
    calibration: Mapping[str, Any] | None = None
    lossless: bool = True
    degraded: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """What a bundle was exported from.

    Attributes:
        model: Name of the checkpoint.
        architecture: Class of the base.
        rotary: Whether attention rotates "inside" the operator or "outside" it.
        versions: Of what made it.
        drafters: SHA-256 of every file of drafters that the checkpoint had, by the file's name, whether or not one of
            them was exported; empty where it had none, and where an earlier version made the bundle.
    """

    model: str = ""
    architecture: str = ""
    rotary: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    drafters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a device has to know of a bundle.

    Attributes:
        graph: File name of the ONNX graph.
        topology: What predicts further tokens.
        drafter: Its graph; None where it needs none, or, in formats 2 and 3, is part of the base's.
        model_type: Architecture of the base, as Hugging Face names it.
        vocab_size: V, the last axis of `logits`.
        tokenizer_size: Tokens that the tokenizer knows; None if that is not checked.
        context_length: Positions the model was built for, an upper bound of every cache.
        kv_layers: KV caches of the base's graph; in formats 2 and 3 those of further heads come behind the base's.
        kv_heads: Key/value heads per layer.
        head_size: Width of one key/value head.
        precision: "fp32", or the scheme of quantization.
        top_k_outputs: K, the last axis of the `topk_*` outputs.
        bos_token_id: Token that begins a text, if there is one.
        eos_token_ids: Tokens that end a text.
        sampling: Sampling defaults by field name (see `SamplingParameters`).
        pass_bytes: What a pass reads; None if that is not known.
        quantization: None in full precision.
        source: Where it comes from.
        files: Every file but the manifest, by name.
    """

    graph: str = "model.onnx"
    topology: Topology = field(default_factory=Plain)
    drafter: DrafterGraph | None = None
    model_type: str = ""
    vocab_size: int
    tokenizer_size: int | None = None
    context_length: int
    kv_layers: int
    kv_heads: int
    head_size: int
    precision: str = "fp32"
    top_k_outputs: int = 128
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    pass_bytes: PassBytes | None = None
    quantization: Quantization | None = None
    source: Source = Source()
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the manifest as it is written."""
        content: dict[str, Any] = {"format_version": FORMAT_VERSION}
        for each in fields(Manifest):  # a subclass may know more
            value = getattr(self, each.name)
            if each.name == "topology":
                value = {"kind": value.kind} | asdict(value)
            elif each.name == "files":
                value = {name: asdict(record) for name, record in value.items()}
            elif isinstance(value, DrafterGraph | Quantization | PassBytes | Source):
                value = asdict(value)
            content[each.name] = value
        content["sha256"] = _digest(content)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        # A vocabulary is thousands of numbers: not a line each.
        return re.sub(r"\[[\d,\s]{200,}\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)


def _digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content, however it is laid out, but for the digest itself."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    try:
        return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    except RecursionError:  # brackets that could just be read
        return ""


def read_manifest(path: Path, verify: bool = False) -> Manifest:
    """Read a manifest of any version that is understood.

    Args:
        path: Where it lies.
        verify: Compare its content with its own sha256, if it has one.

    Raises:
        BundleError: It is unreadable, of another version, or a field is missing or of the wrong type; the message names
            file and field.
    """
    try:
        content = read_object(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is not readable: {error}") from error
    if verify and content.get("sha256") not in (None, _digest(content)):
        raise BundleError(
            f"{path} does not have the sha256 that it says: copy the bundle again, or take the field sha256 out of it "
            "if you changed it yourself"
        )
    version = Fields(path, content).integer("format_version", 1, MOST_ENTRIES)
    if version not in READABLE_VERSIONS:
        raise BundleError(
            f"{path} has format version {version}; this program reads {', '.join(map(str, READABLE_VERSIONS))}: "
            "export the bundle again"
        )
    read = Fields(path, _from_version_2(path, content) if version == 2 else content)
    manifest = Manifest(
        graph=_graph(read),
        topology=_topology(read.object("topology")),
        drafter=_drafter(read.object("drafter")) if version >= 4 and read.has("drafter") else None,
        model_type=read.text("model_type", ""),
        vocab_size=read.integer("vocab_size", 1, _MOST_TOKENS),
        tokenizer_size=read.optional_integer("tokenizer_size", 0, 2 * _MOST_TOKENS),
        context_length=read.integer("context_length", 1, _MOST_POSITIONS),
        kv_layers=read.integer("kv_layers", 1, _MOST_LAYERS),
        kv_heads=read.integer("kv_heads", 1, _MOST_KV_HEADS),
        head_size=read.integer("head_size", 1, _MOST_HEAD_SIZE),
        precision=read.text("precision", "fp32"),
        top_k_outputs=read.integer("top_k_outputs", 1, _MOST_TOKENS),
        bos_token_id=read.optional_integer("bos_token_id", 0, _MOST_TOKENS),
        eos_token_ids=tuple(read.integers("eos_token_ids", 0, _MOST_TOKENS)),
        sampling=_sampling(read),
        pass_bytes=_pass_bytes(read.object("pass_bytes")) if read.has("pass_bytes") else None,
        quantization=_quantization(read.object("quantization")) if read.has("quantization") else None,
        source=_source(read.object("source")) if read.has("source") else Source(),
        files=_files(read),
    )
    _check(path, manifest)
    if version == 2 and (heads := read.integer("n_heads", 1, _MOST_AHEAD)) != manifest.topology.n_heads:
        raise BundleError(f"{path}: a {manifest.topology.kind} bundle cannot have {heads} heads")
    return manifest


def _from_version_2(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of version 2 under today's names: what predicts further tokens stood among the others there."""
    kind = Fields(path, content).text("kind")
    sizes = TOPOLOGIES[kind].sizes_in_version_2(content) if kind in TOPOLOGIES else {}
    return {**content, "topology": {"kind": kind, **sizes}}


def _graph(read: Fields, usual: str = "model.onnx") -> str:
    """Return a graph's name, which lies in the bundle's folder itself."""
    name = read.text("graph", usual)
    if wrong := wrong_name(name) or ("in a folder of its own" if "/" in name else ""):
        raise BundleError(f"{read.path}: field 'graph' names a file {wrong}: {shown(name)}")
    return name


def _topology(read: Fields) -> Topology:
    kind = read.text("kind")
    if kind not in TOPOLOGIES:
        raise BundleError(f"{read.path}: kind {shown(kind)} is not one of {', '.join(TOPOLOGIES)}")
    chosen = TOPOLOGIES[kind]
    return chosen(**{name: read.integer(name, least, _MOST_AHEAD) for name, least in chosen.least.items()})


def _drafter(read: Fields) -> DrafterGraph:
    vocabulary = tuple(read.integers("vocabulary", 0, _MOST_TOKENS, _MOST_TOKENS)) if read.has("vocabulary") else None
    top_k, conditioned = read.integer("top_k_outputs", 1, _MOST_TOKENS), read.flag("conditioned", False)
    layers, heads = read.integer("kv_layers", 1, _MOST_LAYERS), read.integer("kv_heads", 1, _MOST_KV_HEADS)
    return DrafterGraph(_graph(read, "drafter.onnx"), layers, heads, top_k, conditioned, vocabulary)


def _sampling(read: Fields) -> dict[str, Any]:
    values: dict[str, Any] = read.get("sampling", dict, {})
    try:
        check_defaults(values)
    except ParameterError as error:
        raise BundleError(f"{read.path}: field 'sampling': {error}") from error
    return values


def _pass_bytes(read: Fields) -> PassBytes:
    return PassBytes(read.integer("plain", 0, _MOST_FILE_BYTES), read.integer("heads", 0, _MOST_FILE_BYTES))


def _quantization(read: Fields) -> Quantization:
    return Quantization(
        scheme=read.text("scheme", ""),
        parts={name: read.texts(name, names) for name, names in read.entries("parts").items()},
        kv_cache=read.text("kv_cache", "fp32"),
        calibration=_calibration(read.object("calibration")) if read.has("calibration") else None,
        lossless=read.flag("lossless", True),
        degraded=read.flag("degraded", False),
        versions=_texts(read, "versions"),
    )


def _calibration(read: Fields) -> dict[str, Any]:
    return {"text": read.text("text", ""), "tokens": read.integer("tokens", 0, _MOST_FILE_BYTES)}


def _source(read: Fields) -> Source:
    model, architecture, rotary = (read.text(name, "") for name in ("model", "architecture", "rotary"))
    return Source(model, architecture, rotary, _texts(read, "versions"), _texts(read, "drafters"))


def _texts(read: Fields, name: str) -> dict[str, str]:
    """Return an object of texts."""
    entries = read.entries(name)
    read.texts(name, list(entries.values()))
    return entries


def _files(outer: Fields) -> dict[str, FileRecord]:
    files = {}
    for name, entry in outer.entries("files", required=True).items():
        if wrong := wrong_name(name):
            raise BundleError(f"{outer.path} lists a file {wrong}: {shown(name)}")
        if not isinstance(entry, dict) or "bytes" not in entry:
            raise BundleError(f"{outer.path} does not give the size of {name}")
        read = Fields(outer.path, entry)
        sha256 = read.text("sha256", "").lower()
        if sha256 and not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise BundleError(f"{outer.path}: field 'sha256' of {name} is not 64 hex digits")
        files[name] = FileRecord(read.integer("bytes", 0, _MOST_FILE_BYTES), sha256)
    return files


def wrong_name(name: str) -> str:
    """Return what is wrong with the name of a file, which must lie in the bundle's folder; empty if nothing is."""
    if name.startswith("/") or ".." in name.split("/") or "\\" in name or re.match(r"[A-Za-z]:", name):
        return "outside its folder"
    if any(part in ("", ".") for part in name.split("/")) or not name.isprintable():
        return "with a name that cannot be"
    if any(len(part.encode("utf-8")) > _MOST_NAME_BYTES for part in name.split("/")):
        return "with a name that is too long"
    return ""


def _check(path: Path, manifest: Manifest) -> None:
    """Check what no single field tells.

    Raises:
        BundleError: Two fields do not go together.
    """
    drafter, topology = manifest.drafter, manifest.topology
    if drafter is not None:
        _check_drafter(path, manifest, drafter)
    elif manifest.kv_layers <= topology.layers:
        raise BundleError(
            f"{path}: field 'kv_layers' is {manifest.kv_layers}, less than {manifest.topology.layers + 1}"
        )
    heads = manifest.kv_layers * manifest.kv_heads + (0 if drafter is None else drafter.kv_layers * drafter.kv_heads)
    position = 8 * heads * manifest.head_size
    if position > _MOST_POSITION_BYTES:
        raise BundleError(
            f"{path}: fields 'kv_layers', 'kv_heads' and 'head_size' make {position >> 20} MiB of keys and values for "
            "every token, which no model has"
        )
    special = [*manifest.eos_token_ids, *([] if manifest.bos_token_id is None else [manifest.bos_token_id])]
    if not all(i < manifest.vocab_size for i in special):
        raise BundleError(f"{path}: bos or eos token outside the vocabulary of {manifest.vocab_size}")
    if manifest.top_k_outputs > manifest.vocab_size:
        raise BundleError(f"{path}: top_k_outputs {manifest.top_k_outputs} exceeds vocab_size {manifest.vocab_size}")


def _check_drafter(path: Path, manifest: Manifest, drafter: DrafterGraph) -> None:
    """Check what no single field tells of the drafter's graph; see `_check`."""
    if not manifest.topology.parts:
        raise BundleError(f"{path}: a {manifest.topology.kind} bundle has no drafter's graph")
    if drafter.graph == manifest.graph:
        raise BundleError(f"{path}: base and drafter cannot be the same graph {drafter.graph}")
    words = drafter.vocabulary
    if words is not None and (len(set(words)) != len(words) or not words or max(words) >= manifest.vocab_size):
        raise BundleError(f"{path}: the draft vocabulary is not a set of tokens of the vocabulary")
    if drafter.top_k_outputs > (manifest.vocab_size if words is None else len(words)):
        raise BundleError(f"{path}: field 'top_k_outputs' of the drafter exceeds its vocabulary")
