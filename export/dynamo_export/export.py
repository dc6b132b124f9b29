"""From a checkpoint to a bundle: the stages in order."""

from __future__ import annotations

import gc
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dynamo_graph.files import write_report
from dynamo_graph.read import pass_bytes, places
from dynamo_graph.staging import Destination
from dynamo_graph.write import write_model
from dynamo_model.sources import Checkpoint
from dynamo_quantize import check_request, quantize_into
from dynamo_runtime.bundle import list_files, load_bundle
from dynamo_runtime.errors import DynamoError

from . import parity
from .beside import DRAFTER, write_rest
from .build import build_graphs
from .deviation import Deviation, table
from .errors import ExportError
from .graph import InspectedModel, inspect
from .registry import exported
from .source import find_source, load_model

log = logging.getLogger("dynamo_export")


def export_bundle(
    output: str | Path,
    model: str | Path | None = None,
    *,
    heads: int | None = None,
    drafter: str | None = None,
    overwrite: bool = False,
    external_data: bool = False,
    context_length: int | None = None,
    parity_length: int = parity.DEFAULT_LENGTH,
    quantize: str | None = None,
    **quantization: Any,
) -> Path:
    """Export a checkpoint as a bundle, which exists only once it agrees with the torch model.

    Args:
        output: The `.onnx` file; its folder becomes the bundle.
        model: Checkpoint folder, GGUF file, name of a known model, or Hub id; None for the default that ships with
            the package.
        heads: Parallel token heads; 0 for the plain language model, None for all there are.
        drafter: Kind of what predicts further tokens (`dynamo_runtime.registry.TOPOLOGIES`); None for the parallel
            heads, or else the only drafter the checkpoint has.
        overwrite: Replace an earlier export of the same name.
        external_data: Weights in a file of their own even where one file would do.
        context_length: Positions to cover; None for all the model was built for.
        parity_length: Longest sequence the parity gate runs.
        quantize: A scheme of `dynamo_quantize`: the bundle, once it agrees, is made smaller and has to pass those gates
            too.
        **quantization: What else `dynamo_quantize.quantize_bundle` takes.

    Returns:
        The `.onnx` file in its place.

    Raises:
        WriteError: The checkpoint, the arguments or the destination do not allow it, or the graph fails a gate; nothing
            is left behind.
    """
    with Destination(Path(output), overwrite) as destination:
        if quantize is not None:
            check_request(quantize, **quantization)
        checkpoint = find_source(model)
        try:
            staged = _stage(
                destination, checkpoint, _Wanted(heads, drafter, context_length), external_data, parity_length
            )
        except OSError as error:
            raise ExportError(f"cannot write the bundle: {error.strerror or error}; nothing was written") from error
        if quantize is not None:
            return quantize_into(destination, staged, quantize, external_data=external_data, **quantization)
        destination.move_in(staged)
        log.info("the bundle is in %s", destination.folder)
    return destination.folder / destination.graph


class _Wanted(NamedTuple):
    """What of a checkpoint is wanted; fields as the arguments of `export_bundle`."""

    heads: int | None
    drafter: str | None
    context_length: int | None


def _stage(
    destination: Destination, checkpoint: Checkpoint, wanted: _Wanted, external_data: bool, parity_length: int
) -> Path:
    """Make the bundle in a folder of its own and prove it; arguments as of `export_bundle`."""
    clock = _Clock()
    inspected = _load(checkpoint, wanted)
    topology = inspected.exported.topology
    if topology.layers and destination.graph == DRAFTER:
        raise ExportError(f"{DRAFTER} is what the graph of further heads is called: choose another name for the base's")
    what = f"{type(inspected.base).__name__}, {topology.kind}, {topology.n_tokens} token(s) a pass"
    clock.lap(f"loaded {checkpoint.label}: {what}")
    staged = destination.stage()
    bundle = write_rest(checkpoint, staged, destination.graph, inspected)
    cases, left_out = parity.reference(inspected, parity_length)
    clock.lap("ran the torch model")
    built = build_graphs(inspected)
    clock.lap(f"traced {sum(len(graph.graph) for graph in built.graphs)} nodes")
    files = write_model(built.base, staged / bundle.graph, external_data)
    if built.drafter is not None and bundle.drafter is not None:
        shared = places(staged / bundle.graph)
        layers, heads = built.drafter_caches
        bundle = replace(bundle, drafter=replace(bundle.drafter, kv_layers=layers, kv_heads=heads))
        files += write_model(built.drafter, staged / DRAFTER, external_data, shared)
    clock.lap(f"wrote {sum(f.stat().st_size for f in files) / 1e6:.1f} MB of graph and weights")
    built.weights.clear()
    del built, inspected  # the session's weights come instead of torch's
    gc.collect()
    bundle = replace(bundle, pass_bytes=pass_bytes(bundle), files=list_files(staged))
    bundle.write_manifest()
    rows = _gate(staged, cases, left_out)
    clock.lap("passed the parity gate")
    write_report(staged, parity=parity.as_json(rows, cases, left_out))
    replace(bundle, files=list_files(staged)).write_manifest()
    return staged


class _Clock:
    """Logs how long each stage took."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self, what: str) -> None:
        now = time.perf_counter()
        log.info("%s (%.1f s)", what, now - self.last)
        self.last = now


def _load(checkpoint: Checkpoint, wanted: _Wanted) -> InspectedModel:
    base, drafter = load_model(checkpoint, wanted.heads, wanted.drafter)
    longest = getattr(base.config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 2:
        raise ExportError(f"the configuration of {checkpoint.name} does not say how long the model's context is")
    model = exported(base, drafter)
    context = longest if wanted.context_length is None else wanted.context_length
    if not model.least_context <= context <= longest:
        raise ExportError(f"--context-length must be {model.least_context} to {longest}, not {context}")
    return inspect(model, context)


def _gate(staged: Path, cases: list[parity.Case], left_out: list[str]) -> list[Deviation]:
    try:
        bundle = load_bundle(staged)
    except DynamoError as error:
        raise ExportError(f"the exported bundle does not load: {error}") from error
    rows = parity.gate(bundle, cases)
    print(table(rows, left_out))
    failed = [row for row in rows if not row.passed]
    if failed:
        worst = max(failed, key=lambda row: row.difference / row.limit)
        raise ExportError(
            f"the graph does not agree with the torch model in {len(failed)} of {len(rows)} comparisons (worst: "
            f"{worst.case}, {worst.run}, {worst.output}, |Δlogit| {worst.difference:.1e} over {worst.limit:.1e}): "
            "nothing was written"
        )
    return rows
