"""From a bundle to a smaller bundle: the stages in order."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dynamo_graph.files import read_json, read_report, version, write_json, write_report
from dynamo_graph.read import pass_bytes
from dynamo_graph.staging import Destination
from dynamo_runtime.bundle import Bundle, list_files, load_bundle
from dynamo_runtime.corpus import read_documents
from dynamo_runtime.errors import DynamoError
from dynamo_runtime.manifest import Quantization

from . import gates
from .conversations import Exchange, own_words
from .errors import QuantizeError
from .graph import write_graphs
from .schemes import Options, Scheme, resolve
from .texts import OWN, pieces

CALIBRATION_PIECES, CALIBRATION_TOKENS = 64, 256
TEXTS, TEXT_TOKENS = 24, 384
WIDTHS, WIDTH_TOKENS = 8, 64
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 64, 48

log = logging.getLogger("dynamo_quantize")


def quantize_bundle(
    source: str | Path,
    output: str | Path,
    scheme: str,
    options: Options | None = None,
    *,
    calibration: str | Path | None = None,
    gate_text: str | Path | None = None,
    allow_degraded: bool = False,
    overwrite: bool = False,
    external_data: bool = False,
) -> Path:
    """Write a smaller bundle beside a bundle in full precision; it exists only once it has passed its gates.

    Needs no torch. The source is only read.

    Args:
        source: The bundle, or its `.onnx` file.
        output: The `.onnx` file of the new bundle.
        scheme: One of `SCHEMES`.
        options: What departs from the scheme's defaults.
        calibration: Text for GPTQ and for the ranges of an 8-bit cache: a folder, a text file or a .jsonl file; None
            for what the bundle itself answers to questions of ours, if it can be talked to, or else Python's standard
            library.
        gate_text: Text for the gates; None for the bundle's answers to other questions, or else the modules of the
            standard library that are held out from training.
        allow_degraded: Write the bundle even if a gate fails, and say so in its manifest.
        overwrite: Replace an earlier bundle of the same name.
        external_data: Weights in a file of their own even where one file would do.

    Returns:
        The `.onnx` file in its place.

    Raises:
        WriteError: The bundle, the arguments or the destination do not allow it, or a gate failed; nothing is left.
    """
    resolve(scheme, options or Options())  # what means nothing is said first
    if Path(output).absolute().parent.resolve() == _folder(source):
        raise QuantizeError(f"{source} is the bundle that is to be quantized: choose another folder for the new one")
    with Destination(Path(output), overwrite) as destination:
        return quantize_into(
            destination,
            source,
            scheme,
            options,
            calibration=calibration,
            gate_text=gate_text,
            allow_degraded=allow_degraded,
            external_data=external_data,
        )


def quantize_into(
    destination: Destination,
    source: str | Path,
    scheme: str,
    options: Options | None = None,
    *,
    calibration: str | Path | None = None,
    gate_text: str | Path | None = None,
    allow_degraded: bool = False,
    external_data: bool = False,
) -> Path:
    """Return the same into a destination that is entered already; arguments as of `quantize_bundle`.

    Raises:
        WriteError: As `quantize_bundle`.
    """
    wanted = resolve(scheme, options or Options())
    try:
        bundle = load_bundle(source, verify=True)
    except DynamoError as error:
        raise QuantizeError(str(error)) from error
    if bundle.topology.parts and bundle.drafter is None:
        raise QuantizeError(
            f"{bundle.folder} has its heads in the base's graph, as earlier versions did: export it again"
        )
    if bundle.precision != "fp32":
        raise QuantizeError(
            f"{bundle.folder} is {bundle.precision} already: quantize the bundle in fp32 that it came from"
        )
    if destination.graph in bundle.graphs[1:]:
        raise QuantizeError(
            f"{destination.graph} is what the graph of further heads is called: choose another name for the base's"
        )
    try:
        staged = destination.stage()
        spoken = own_words(bundle) if calibration is None or gate_text is None else []
        # Before the work begins, as the text may not do. Calibration and gates get every other conversation each.
        samples = _samples(bundle, gate_text, spoken[1::2])
        log.info(
            "quantizing to %s%s", scheme, ": reading the calibration text takes a while" if wanted.calibrated else ""
        )
        text = spoken[::2] if calibration is None else calibration
        small = write_bundle(bundle, wanted, staged, destination.graph, text, external_data)
        log.info("wrote it; running both bundles through the gates")
        lost = _pass_gates(bundle, small, wanted, samples, allow_degraded)
    except DynamoError as error:
        raise QuantizeError(str(error)) from error
    except OSError as error:
        raise QuantizeError(f"cannot write the bundle: {error.strerror or error}; nothing was written") from error
    destination.move_in(staged)
    log.info("the %s bundle is in %s: %s", scheme, destination.folder, lost)
    return destination.folder / destination.graph


def _folder(bundle: str | Path) -> Path:
    path = Path(bundle).absolute()
    return (path.parent if path.suffix == ".onnx" else path).resolve()


def check_request(
    scheme: str,
    options: Options | None = None,
    calibration: str | Path | None = None,
    gate_text: str | Path | None = None,
    allow_degraded: bool = False,
) -> None:
    """Check what can be checked before there is a bundle; arguments as of `quantize_bundle`.

    Raises:
        QuantizeError: The scheme or its options mean nothing, or there is no such text.
    """
    resolve(scheme, options or Options())
    try:
        for source in (calibration, gate_text):
            if source is not None:
                next(read_documents(source))
    except DynamoError as error:
        raise QuantizeError(str(error)) from error


def write_bundle(
    bundle: Bundle,
    scheme: Scheme,
    folder: Path,
    graph: str = "model.onnx",
    calibration: str | Path | Sequence[Exchange] | None = None,
    external: bool = False,
) -> Bundle:
    """Write a smaller bundle that has not passed any gate.

    Args:
        bundle: The bundle in full precision.
        scheme: From `resolve`.
        folder: An empty folder.
        graph: File name of the graph in it.
        calibration: See `quantize_bundle`; or conversations to calibrate with.
        external: Weights in a file of their own even where one file would do.

    Raises:
        QuantizeError: The graph or the calibration text does not allow it.
        DynamoError: The bundle does not run.
    """
    texts, name = _calibration(bundle, calibration) if scheme.calibrated else ([], "")
    parts = write_graphs(bundle, scheme, folder, graph, texts, external)
    _copy_rest(bundle, folder, graph)
    made = replace(
        bundle,
        folder=folder,
        graph=graph,
        precision=scheme.name,
        quantization=Quantization(
            scheme=scheme.name,
            parts={str(part): names for part, names in parts.items()},
            kv_cache=scheme.kv_cache if scheme.kv_cache != "fp32" else scheme.activations,
            calibration={"text": name, "tokens": sum(map(len, texts))} if texts else None,
            lossless=scheme.lossless,
            versions={name: version(name) for name in ("dynamo-edge", "onnx", "onnxruntime")},
        ),
        files=list_files(folder),
    )
    made = replace(made, pass_bytes=pass_bytes(made))
    made.write_manifest()
    return load_bundle(folder)


def _calibration(bundle: Bundle, source: str | Path | Sequence[Exchange] | None) -> tuple[list[list[int]], str]:
    """Return text to calibrate with, as tokens, and what it is: the package's own where there is no other."""
    if source is not None and not isinstance(source, str | Path):
        if source:
            return [conversation.tokens for conversation in source], _answers_to(source)
        source = None
    length = min(CALIBRATION_TOKENS, bundle.context_length)
    texts = pieces(bundle, source, CALIBRATION_PIECES, length, held_out=False)
    return texts, OWN if source is None else Path(source).name


def _answers_to(spoken: Sequence[Exchange]) -> str:
    return f"its own answers to {len(spoken)} questions"


def _pass_gates(full: Bundle, small: Bundle, scheme: Scheme, samples: gates.Samples, allow_degraded: bool) -> str:
    """Run both bundles, print the table, and put it into the report of the smaller one; return what it lost.

    Raises:
        QuantizeError: A limit is not kept, and that is not allowed.
    """
    reference = gates.measure(full, samples)
    log.info("measured the bundle in full precision")
    found = gates.measure(small, samples, reference)
    rows = gates.judge(reference, found, scheme.limits, lossless=scheme.lossless)
    print(gates.table(rows, samples.name))
    failed = [row for row in rows if not row.passed]
    if failed and not allow_degraded:
        raise QuantizeError(
            f"{len(failed)} of the {sum(row.limit is not None for row in rows)} limits are not kept (first: "
            f"{failed[0].figure}, {failed[0].value:.4g} where {failed[0].limit:.4g} is allowed): nothing was written "
            "(--allow-degraded writes it all the same)"
        )
    assert small.quantization is not None
    flipped = any(row.gate == "width" for row in failed)
    quantization = replace(small.quantization, lossless=scheme.lossless and not flipped, degraded=bool(failed))
    write_report(small.folder, gates={"limits_percent": asdict(scheme.limits)} | gates.as_json(rows, samples))
    replace(small, quantization=quantization, files=list_files(small.folder)).write_manifest()
    return gates.summary(rows)


def _samples(bundle: Bundle, source: str | Path | None, spoken: Sequence[Exchange]) -> gates.Samples:
    """Return text for the gates, no longer than the bundle's context allows."""
    room = bundle.context_length
    new_tokens = min(NEW_TOKENS, room // 2)
    if source is None and spoken:
        long = [each for each in spoken if len(each.answer) > bundle.topology.n_tokens]
        return gates.Samples(
            _answers_to(spoken),
            [each.tokens for each in long],
            [each.tokens[-WIDTH_TOKENS:] for each in long[:WIDTHS]],
            [each.prompt for each in spoken],
            new_tokens,
            starts=[len(each.prompt) - 1 for each in long],
            questions=[each.prompt for each in spoken],
            answers=[each.answer for each in spoken],
        )

    def cut(count: int, length: int) -> list[list[int]]:
        return pieces(bundle, source, count, min(length, room), held_out=True)

    prompts = [piece[: room - new_tokens] for piece in cut(PROMPTS, PROMPT_TOKENS)]
    name = OWN if source is None else Path(source).name
    return gates.Samples(name, cut(TEXTS, TEXT_TOKENS), cut(WIDTHS, WIDTH_TOKENS), prompts, new_tokens)


def _copy_rest(bundle: Bundle, staged: Path, graph: str) -> None:
    """Copy everything but graphs, weights and manifest."""
    for name in bundle.files:
        if not name.startswith(tuple(bundle.graphs)):
            shutil.copyfile(bundle.folder / name, staged / name)
    write_report(staged, **read_report(bundle.folder))
    interop = staged / "genai_config.json"
    if interop.is_file():
        config = read_json(interop)
        try:
            config["model"]["decoder"]["filename"] = graph
        except (KeyError, TypeError):
            raise QuantizeError(f"{bundle.folder / interop.name} does not say which graph it is about") from None
        write_json(interop, config)
