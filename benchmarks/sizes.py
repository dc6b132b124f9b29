"""How cost grows with the model: random weights at the shapes of real models, exported, quantized, loaded and run.

    python benchmarks/sizes.py [SHAPE …] --work FOLDER [--json FILE] [--plot FILE]
    python benchmarks/sizes.py --table JSON [--page docs/sizes.md] [--plot FILE]

Random weights cost what trained ones cost, and say nothing sensible.  So gates that judge what they say have no limit
here and read this script instead of a large text; 4-bit weights are rounded to nearest, GPTQ having nothing to find.
Of every shape: seconds and peak memory of the export to fp32 with its parity gate and of the quantization with its
gates (commands of their own); then of every precision bytes, load time, peak memory of load, prompt and decoding in a
process of its own, T(m), how much of a plain pass reading weights and cache at the memory's speed must take ("share of
the roofline"), and milliseconds a token outside onnxruntime.  Figures of shapes that are already in the JSON file are
kept; folders of checkpoints and bundles are left in FOLDER and used again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from page import put_between, wrapped

from dynamo_quantize.memory import peak_memory
from dynamo_runtime import Engine, load_bundle
from dynamo_runtime.files import write_whole
from dynamo_runtime.profiling.passes import PassTimer
from dynamo_runtime.profiling.roofline import read_bandwidth, roofline
from dynamo_runtime.providers import cores, import_onnxruntime
from dynamo_runtime.tables import Table

MARK = "begin: python benchmarks/sizes.py"
PASTS, WIDTHS = (64, 1024), (1, 2, 4, 8)
CONTEXT, PARITY_LENGTH = 2048, 64
READ_BYTES, READ_SECONDS = 256 << 20, 2.0
NEW_TOKENS = 48

LLAMA: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": CONTEXT}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": LLAMA
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
    "SmolLM2-135M": LLAMA
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "Qwen2.5-0.5B": LLAMA
    | {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "Llama-3.2-1B": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
DEFAULT = ("SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.2-1B")
PRECISIONS = {"int8": (), "int4": ("--algorithm", "rtn")}
UNJUDGED = ("--max-perplexity-loss", 1000, "--calibration", __file__, "--gate-text", __file__)


def make_checkpoint(shape: str, folder: Path) -> None:
    """Random weights, with the embedded model's tokenizer: its tokens are the first of every larger vocabulary."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from dynamo_model import DEFAULT_CHECKPOINT

    torch.manual_seed(0)
    settings = dict(SHAPES[shape])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms of equal weights would be merged
            parameter.data += 0.02 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT).save_pretrained(folder)


def run(*arguments: object) -> dict[str, float]:
    """Run a Python module with arguments; seconds, and the most memory it had, in bytes.

    Raises:
        SystemExit: It failed.
    """
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} ended with status {process.returncode}")
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return {"seconds": time.perf_counter() - started, "peak_bytes": usage.ru_maxrss * kilobyte}


def make(shape: str, work: Path) -> dict[str, Any]:
    """Return the checkpoint and bundles of a shape; what each command took."""
    checkpoint, full = work / shape / "checkpoint", work / shape / "fp32" / "model.onnx"
    if not (checkpoint / "config.json").is_file():
        run(__file__, "--make", shape, "--work", checkpoint)
    costs: dict[str, Any] = {}
    export = ["-m", "dynamo_export.cli", full, "-m", checkpoint, "--heads", "0"]
    costs["fp32"] = made(full, *export, "--context-length", CONTEXT, "--parity-length", PARITY_LENGTH)
    for precision, options in PRECISIONS.items():
        graph = work / shape / precision / "model.onnx"
        quantize = ["-m", "dynamo_quantize.cli", full.parent, "-o", graph.parent, "--scheme", precision]
        costs[precision] = made(graph, *quantize, *options, *UNJUDGED)
    return costs


def made(graph: Path, *arguments: object) -> dict[str, float]:
    """Return what making a bundle took, which is written beside it; as it was the first time if the bundle is there."""
    kept = graph.parent.with_suffix(".json")
    if not (graph.is_file() and kept.is_file()):
        kept.write_text(json.dumps(run(*arguments)))
    found: dict[str, float] = json.loads(kept.read_text())
    return found


def measure(folder: Path, threads: int, bandwidth: float, seconds: float) -> dict[str, Any]:
    """Return what a bundle takes to load and to run."""
    bundle = load_bundle(folder)
    started = time.perf_counter()
    engine = Engine(bundle, provider="cpu", threads=threads)
    load_s = time.perf_counter() - started
    passes = PassTimer(engine.session).passes(PASTS, seconds)
    floors = roofline(bundle, engine.session, passes, bandwidth)
    engine.reset()
    limits: dict[str, Any] = {"strategy": "autoregressive", "temperature": 0.0, "ignore_eos": True}
    cost = engine.generate(list(range(1, 65)), max_new_tokens=NEW_TOKENS, **limits).statistics
    return {
        "bytes": bundle.graph_bytes,
        "load_s": load_s,
        "peak_bytes": peak_memory(folder),
        "ms": {f"{past}": {each.rows: each.inside for each in passes if each.past == past} for past in PASTS},
        "share_of_roofline": {f"{each.past}": each.floor / each.measured for each in floors},
        "outside_ms": cost.outside_share * (cost.total_s - cost.ttft_s) / (cost.rounds - 1) * 1e3,
    }


def tables(record: dict[str, Any]) -> str:
    """Return the tables for the docs: what making a bundle takes, and what running it takes."""
    making, running = [], []
    for shape, found in record["shapes"].items():
        for precision, cost in found["making"].items():
            making.append([shape, precision, f"{cost['seconds']:.0f}", f"{cost['peak_bytes'] / 1e9:.1f}"])
        for precision, row in found["running"].items():
            cells = [f"{row['bytes'] / 1e6:.0f}", f"{row['load_s']:.2f}", f"{row['peak_bytes'] / 1e6:.0f}"]
            for past in PASTS:
                by_width = row["ms"][str(past)]
                cells += [f"{by_width['1']:.2f}", *(f"{by_width[str(m)] / by_width['1']:.2f}" for m in WIDTHS[1:])]
            cells += [f"{row['share_of_roofline'][str(past)]:.0%}" for past in PASTS]
            running.append([shape, precision, *cells, f"{row['outside_ms']:.2f}"])
    titles = [
        name
        for past in PASTS
        for name in (f"ms a plain pass, past {past:,}", *(f"T({m}) ÷ T(1), past {past:,}" for m in WIDTHS[1:]))
    ]
    columns = ["MB", "load, s", "peak MB", *titles, *(f"share of roofline, past {past:,}" for past in PASTS)]
    made_of = Table("Making a bundle", ["shape", "precision", "seconds", "peak GB"], making)
    run_of = Table("Running it", ["shape", "precision", *columns, "ms outside onnxruntime"], running)
    conditions = f"{record['threads']} threads; memory is read at {record['bandwidth'] / 1e9:.0f} GB/s."
    return f"{made_of.markdown()}\n\n{run_of.markdown()}\n\n" + wrapped(f"{conditions} {record['machine']}.")


def plot(record: dict[str, Any], path: Path) -> None:
    """Time of a plain pass, and of one over four rows in units of it, by bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    past = str(PASTS[0])
    for precision in ("fp32", *PRECISIONS):
        rows = [found["running"][precision] for found in record["shapes"].values()]
        rows.sort(key=lambda row: row["bytes"])
        megabytes = [row["bytes"] / 1e6 for row in rows]
        left.plot(megabytes, [row["ms"][past]["1"] for row in rows], marker="o", label=precision)
        right.plot(megabytes, [row["ms"][past]["4"] / row["ms"][past]["1"] for row in rows], marker="o")
    reach = np.array(left.get_xlim())
    left.plot(reach, reach * 1e9 / record["bandwidth"], ":", color="gray", label="reading it from memory")
    left.set(xlabel="MB of graph and weights", ylabel=f"ms of a plain pass, past {past}", xscale="log", yscale="log")
    left.legend()
    right.set(xlabel="MB of graph and weights", ylabel=f"T(4) ÷ T(1), past {past}", xscale="log", ylim=(1, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Measure the shapes, and print the tables of all that are known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)} (default: all but the first)"
    )
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="for checkpoints and bundles: up to 20 GB")
    parser.add_argument("--threads", type=int, default=cores(), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timed passes a bundle (default: 60)")
    parser.add_argument("--json", type=Path, help="keep the figures")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print kept figures, and measure nothing")
    parser.add_argument("--page", type=Path, help="put the tables into this page, between its marks")
    parser.add_argument("--plot", type=Path, help="draw them there (.svg or .png)")
    parser.add_argument("--make", choices=list(SHAPES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.shapes) - set(SHAPES):
        parser.error(f"unknown shape {min(unknown)!r}: choose {', '.join(SHAPES)}")
    if arguments.work is None and not arguments.table:
        parser.error("--work is missing: a folder for checkpoints and bundles")
    if arguments.make:
        make_checkpoint(arguments.make, arguments.work)
        return
    kept = arguments.table or arguments.json
    record: dict[str, Any] = json.loads(kept.read_text()) if kept and kept.is_file() else {"shapes": {}}
    if not arguments.table:
        record["machine"] = f"{describe_machine()}; onnxruntime {import_onnxruntime().__version__}"
        record["threads"] = arguments.threads
        record["bandwidth"] = read_bandwidth(arguments.threads, READ_SECONDS, READ_BYTES)
        for shape in arguments.shapes or DEFAULT:
            making = make(shape, arguments.work)
            running = {
                precision: measure(
                    arguments.work / shape / precision, arguments.threads, record["bandwidth"], arguments.seconds
                )
                for precision in making
            }
            record["shapes"][shape] = json.loads(json.dumps({"making": making, "running": running}))
            if arguments.json:
                arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(tables(record))
    if arguments.page:
        write_whole(arguments.page, put_between(arguments.page.read_text(encoding="utf-8"), MARK, tables(record)))
    if arguments.plot:
        plot(record, arguments.plot)


if __name__ == "__main__":
    main()
