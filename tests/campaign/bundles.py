"""Damaged bundles: what loads must write what the sound bundle writes, unless whoever damaged it could also sign it."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from support import handmade

from dynamo_runtime import DynamoError, Engine, load_bundle

from .values import EXTREMES, damage_bytes, damage_json
from .workers import Log, Verdict

SILENT, HALF, DIFFERS = "silent wrong text", "half bundle loaded", "verified text differs from plain"
OUTSIDE, UNPICKLED = "read outside the bundle", "unpickled"
FORBIDDEN = {SILENT, HALF, DIFFERS, OUTSIDE, UNPICKLED, "an error that is not one line"}
MANIFEST, COUNTS = "dynamo_config.json", "cooccurrence.npz"
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)
PROMPT, TOKENS = "def fib(n):\n    if", 8
_sound: dict[str, Path] = {}
_texts: dict[str, list[str]] = {}
_events: list[str] = []


def prepare(folder: Path) -> None:
    """The sound bundles, one of every topology, and a file beside them that nobody is to read."""
    (folder / "secret.json").write_text("{}")
    tokenizer_config = json.dumps({"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"})
    told = {"conditioned": True, "vocabulary": list(range(40, 300, 3)), "shared": True}
    graphs: dict[str, dict[str, Any]] = {
        "plain": {},
        "parallel": {"shared": True},
        "conditioned": told,
        "cp": {"kind": "cp", "rank": 2},
        "lookahead": {"kind": "lookahead"},
        "parallel, format 3": {"format_version": 3},
    }
    for name, graph in graphs.items():
        tokenizer = handmade.train_tokenizer(control=["<s>", "</s>"])
        files = {"tokenizer_config.json": tokenizer_config} if name == "parallel" else {}
        n_heads = 1 if name == "plain" else 3
        handmade.write_bundle(folder / name, n_heads, tokenizer=tokenizer, files=files, graph=graph)
        _sound[name] = folder / name


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        _events.append(UNPICKLED)
    elif event == "open" and isinstance(arguments[0], str) and "secret" in arguments[0]:
        _events.append(OUTSIDE)


def texts(folder: Path, verify: bool) -> list[str]:
    """What a bundle writes: plainly, verified and by Algorithm 1 where it can, to a message where it has a template."""
    engine = Engine(load_bundle(folder, verify=verify), provider="cpu", threads=1)
    kind = engine.bundle.topology.kind  # of a damaged one perhaps another than the sound one's
    strategies = ["autoregressive"] + ["speculative"] * (kind != "plain") + ["dynamo"] * (kind == "parallel")
    found = []
    for strategy in strategies:
        engine.reset()
        found.append(engine.generate(PROMPT, strategy=strategy, max_new_tokens=TOKENS, seed=1).text)
    if (folder / "tokenizer_config.json").exists():
        found.append(engine.chat([{"role": "user", "content": "x<s>"}], max_new_tokens=TOKENS, seed=1).text)
    return found


def case(rng: Random, scratch: Path, log: Log) -> Verdict:
    """One bundle with one to three faults, its hashes mended or not."""
    if not _texts:  # first of this worker
        try:
            _texts.update({kind: texts(folder, True) for kind, folder in _sound.items()})
        except DynamoError as error:
            raise AssertionError(f"a sound bundle is refused: {error}") from error
        sys.addaudithook(_watch)
    kind = rng.choice(list(_sound))
    folder = scratch / "bundle"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(_sound[kind], folder)
    shutil.copyfile(_sound[kind].parent / "secret.json", scratch / "secret.json")
    mended, verify = rng.random() < 0.5, rng.random() < 0.5
    log(f"{kind}, {'hashes mended' if mended else 'hashes left'}{', verify' * verify}")
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(FAULTS)(rng, folder, log)
    if mended:
        _mend(folder)
    listed = json.loads((_sound[kind] / MANIFEST).read_text())["files"]
    signed = (folder / MANIFEST).is_file() and (folder / MANIFEST).read_bytes() == (
        _sound[kind] / MANIFEST
    ).read_bytes()
    whole = all(_size(folder / name) == record["bytes"] for name, record in listed.items())
    same = all(_content(folder / name) == (_sound[kind] / name).read_bytes() for name in listed)
    _events.clear()
    try:
        found = texts(folder, verify)
    except DynamoError:
        if _events:
            return Verdict(_events[0])
        raise
    if _events:
        return Verdict(_events[0])
    if signed and not whole:
        return Verdict(HALF)
    if found == _texts[kind]:
        return Verdict("right text")
    if signed and (verify or same):
        return Verdict(SILENT)
    graph_is_sound = _content(folder / handmade.GRAPH) == (_sound[kind] / handmade.GRAPH).read_bytes()
    if graph_is_sound and len(found) > 1 and found[0] != found[1]:
        return Verdict(DIFFERS)
    return Verdict("other text, of a bundle that was changed on purpose or not verified")


def _mend(folder: Path) -> None:
    """Sign the files as they are now, if there is a manifest to do it in."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"]
        for name in files:
            if (folder / name).is_file() and isinstance(files[name], dict):
                content = (folder / name).read_bytes()
                files[name] |= {"bytes": len(content), "sha256": handmade.sha256(folder / name)}
        path.write_text(json.dumps(manifest))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _manifest(rng: Random, folder: Path, log: Log) -> None:
    _edit(rng, folder / MANIFEST, log)


def _record(rng: Random, folder: Path, log: Log) -> None:
    """One value of what the manifest says of the drafter's graph."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        record = manifest["drafter"]
        words = record["vocabulary"] or list(range(64))
        changes: dict[str, Any] = {
            "graph": rng.choice((handmade.GRAPH, "../secret.json", "tokenizer.json", "", rng.choice(EXTREMES))),
            "top_k_outputs": rng.choice((0, 1, 63, 10**9, rng.choice(EXTREMES))),
            "conditioned": rng.choice((not record["conditioned"], None, rng.choice(EXTREMES))),
            "vocabulary": rng.choice(
                (None, [], words[::-1], words[:-1], [*words, 7], [*words, 7, 7], [-1], [10**6], rng.choice(EXTREMES))
            ),
        }
        name = rng.choice(sorted(changes))
        if rng.random() < 0.1:
            manifest["drafter"] = rng.choice((None, [], "drafter.onnx", {}))
        else:
            record[name] = changes[name]
        path.write_text(json.dumps(manifest))
        log(f"drafter's {name}: {str(changes[name])[:60]}")
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        _edit(rng, path, log)


def _tokenizer(rng: Random, folder: Path, log: Log) -> None:
    _edit(rng, folder / "tokenizer.json", log)


def _configuration(rng: Random, folder: Path, log: Log) -> None:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return _manifest(rng, folder, log)
    if rng.random() < 0.5:
        return _edit(rng, path, log)
    template = rng.choice(TEMPLATES)
    log(f"template {template[:60]}")
    path.write_text(json.dumps({"chat_template": template}))
    return None


TEMPLATES = (
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages[0].__init__.__globals__ }}",
    "{% include 'secret.json' %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 10**10**8 }}",
    "{{ 1 / 0 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ raise_exception('no\nline') }}",
    "{% if %}",
    "{{",
    "",
    "{{ '\ud800' }}",
    "{{ messages | map(attribute='content') | join | upper | center(10**10) }}",
)


def _edit(rng: Random, path: Path, log: Log) -> None:
    """One value of a JSON file."""
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return _bytes_of(rng, path, log)
    text, what = damage_json(rng, content)
    log(f"{path.name}: {what}")
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return None


def _bytes_of(rng: Random, path: Path, log: Log) -> None:
    if path.is_file():
        data, what = damage_bytes(rng, path.read_bytes())
        log(f"{path.name}: {what}")
        path.write_bytes(data)


def _bytes(rng: Random, folder: Path, log: Log) -> None:
    _bytes_of(rng, rng.choice(sorted(folder.iterdir())), log)


def _swap(rng: Random, folder: Path, log: Log) -> None:
    """Another bundle's file, a folder, or nothing in a file's place."""
    path = rng.choice(sorted(folder.iterdir()))
    how = rng.choice(("missing", "a folder", "another bundle's", "a link outside", "another file of this bundle"))
    log(f"{path.name}: {how}")
    others = [other / path.name for other in _sound.values() if (other / path.name).is_file()]
    if how == "another file of this bundle":
        others = [other for other in sorted(folder.iterdir()) if other.is_file() and other != path] or [path]
    content = rng.choice(others).read_bytes() if others else b""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how == "a link outside":
        path.symlink_to("../secret.json")
    elif how != "missing":
        path.write_bytes(content)


def _foreign_tokenizer(rng: Random, folder: Path, log: Log) -> None:
    names = [f"<{i}>" for i in range(rng.choice((1, 5, 300)))]
    control, added = rng.choice(((names, []), ([], names)))
    log(f"tokenizer with {len(control)} more control tokens and {len(added)} added ones")
    path = folder / "tokenizer.json"
    if not path.is_dir():  # as another fault may have made of it
        handmade.train_tokenizer(control, added).save(str(path))


def _counts(rng: Random, folder: Path, log: Log) -> None:
    """One member of the n-gram counts."""
    path = folder / COUNTS
    try:
        with np.load(path) as archive:
            arrays: dict[str, Any] = dict(archive)
    except Exception:  # of counts that another fault has spoilt already
        return _bytes_of(rng, path, log)
    name = rng.choice(sorted(arrays))
    array = np.atleast_1d(arrays[name])
    place = rng.randrange(max(1, array.size))
    changes: dict[str, Callable[[], Any]] = {
        "missing": lambda: None,
        "empty": lambda: array[:0],
        "shorter": lambda: array[:-1],
        "longer": lambda: np.concatenate([array, array]),
        "float": lambda: array.astype(float) + 0.5,
        "nan": lambda: np.full(array.shape, np.nan),
        "text": lambda: array.astype("U8"),
        "flags": lambda: array.astype(bool),
        "complex": lambda: array.astype(complex),
        "times": lambda: array.astype("M8[s]"),
        "record": lambda: np.zeros(3, "i4,f8"),
        "a scalar": lambda: np.array(3),
        "two axes": lambda: array[None],
        "negative": lambda: -array.astype(np.int64),
        "reversed": lambda: array[::-1],
        "zeros": lambda: np.zeros_like(array),
        "huge": lambda: np.full(array.shape, np.iinfo(np.int64).max),
        "one value": lambda: _put(array, place, rng.choice((-1, 0, 10**6, 2**31 - 1, 2**40))),
        "large": lambda: None,
        "pickled": lambda: np.array([_Trap()], object),
    }
    how = rng.choice(sorted(changes))
    log(f"{COUNTS}: {name} {how}")
    arrays[name] = changes[how]()
    if how == "large":  # of which little is on disk
        return _bomb(path, name, arrays)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return None


def _bomb(path: Path, name: str, arrays: dict[str, Any]) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<i8", "fortran_order": False, "shape": (10**9,)})
    del arrays[name]
    np.savez(path, **arrays)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{name}.npy", "w") as member:
        member.write(head.getvalue())
        for _ in range(16):
            member.write(bytes(1 << 20))


def _put(array: np.ndarray, place: int, value: int) -> np.ndarray:
    found = array.astype(np.int64).reshape(-1)
    if found.size:
        found[place] = value
    return found.reshape(array.shape)


class _Trap:
    """An object that is noticed when it is unpickled."""

    def __reduce__(self) -> Any:
        return (pickle.loads, (pickle.dumps(1),))


def _graph(rng: Random, folder: Path, log: Log) -> None:
    """One node, input, output or weight of the graph."""
    paths = [folder / name for name in (handmade.GRAPH, handmade.DRAFTER) if (folder / name).is_file()]
    path = rng.choice(paths or [folder / handmade.GRAPH])
    try:
        model = onnx.load(str(path), load_external_data=False)
        graph = model.graph
        how = rng.choice(("drop node", "drop output", "drop input", "rename", "operator", "shape", "weight", "outside"))
        what = {"drop output": graph.output, "drop input": graph.input, "shape": [*graph.input, *graph.output]}
        found = what.get(how, graph.initializer if how in ("weight", "outside") else graph.node)
        chosen = rng.choice(list(found))
        log(f"{path.name}: {how} {chosen.name or getattr(chosen, 'op_type', '')}")
        if how.startswith("drop"):
            found.remove(chosen)
        elif how == "rename":
            chosen.output[0] += "x"
        elif how == "operator":
            chosen.op_type = rng.choice(("Add", "Identity", "Loop", "NoSuch", "Softmax"))
        elif how == "shape":
            sizes = chosen.type.tensor_type.shape.dim
            if sizes:
                rng.choice(list(sizes)).dim_value = rng.choice((0, 1, 7, 10**6, 2**40))
            else:
                sizes.add().dim_value = 3
        elif how == "weight":
            array = numpy_helper.to_array(chosen)
            factor = rng.choice((0, -1, np.inf, np.nan, 1e30))
            with np.errstate(all="ignore"):
                chosen.CopyFrom(numpy_helper.from_array((array * factor).astype(array.dtype), chosen.name))
        else:
            chosen.ClearField("raw_data")
            chosen.ClearField("external_data")
            chosen.data_location = onnx.TensorProto.EXTERNAL
            chosen.external_data.add(key="location", value=rng.choice(("../secret.json", "/etc/passwd", "model.onnx")))
        path.write_bytes(model.SerializeToString())
    except Exception:  # of a graph that another fault has spoilt already
        _bytes_of(rng, path, log)


def _listed(rng: Random, folder: Path, log: Log) -> None:
    """A file more in the manifest's list."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        name = rng.choice(
            ("../secret.json", "/etc/passwd", "a/../../secret.json", "C:\\x", "..\\secret.json", "", ".", "\0")
        )
        manifest["files"][name] = rng.choice(({"bytes": 2, "sha256": ""}, {}, [], rng.choice(EXTREMES)))
        path.write_text(json.dumps(manifest))
        log(f"manifest lists {name!r}")
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        _bytes_of(rng, path, log)


FAULTS = (
    *(_manifest,) * 6,
    *(_bytes,) * 3,
    *(_counts,) * 3,
    *(_record,) * 2,
    *(_graph,) * 4,
    *(_tokenizer,) * 2,
    *(_configuration,) * 2,
    _swap,
    _foreign_tokenizer,
    _listed,
)
