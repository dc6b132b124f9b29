r"""What a user could run instead: this project beside onnxruntime-genai, llama.cpp and transformers, interleaved.

    python benchmarks/peers.py --ours int8=BUNDLE int4=BUNDLE --llama-cpp FOLDER --json FILE

For example `-m smollm2` (the default) exported with `--heads 0` and quantized; `--heads int8=BUNDLE` adds the same
model with further heads.  All run the same checkpoint on the same number of threads, each in a process of its own
(peer_worker.py), and are asked in turn, in an order that rotates, so that a drift of the machine's speed falls on all
alike; a precision's processes are there together, and one alone works.  What the peers need is made in --work on first
use, and kept: the checkpoint as a folder, what onnxruntime-genai's builder makes of it at our bits and block, and GGUF
files of other precisions.  A peer that is missing is left out, with a line that says how to get it:
onnxruntime-genai and transformers with pip (`--peer-python genai=PYTHON` where they need an environment of their own),
llama.cpp with `python benchmarks/build_llama_cpp.py FOLDER`.

Fixed lengths: reading 512 tokens, and decoding behind 64 and behind 1,024, plainly, --rounds times.  Answers: prompts
of every task of `benchmarks/prompts`, greedily (`dynamo` at temperature 0.7), as many tokens as the first bundle's
plain answer has, --new-tokens at most; plainly and in every way to draft that a peer has without training.  The figures
go to --json, and `python benchmarks/peers_page.py` makes docs/peers.md of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import describe_machine
from peer_models import PeerError, checkpoint, genai_model, gguf_model, program, stored_bytes
from tasks import DECODING, LEAST_TOKENS, PLAIN, TASKS, named, prompts_of
from tqdm import tqdm

from dynamo_runtime import Bundle, Engine, load_bundle
from dynamo_runtime.cache import cache_folder
from dynamo_runtime.errors import DynamoError
from dynamo_runtime.files import write_whole

WORKER = Path(__file__).with_name("peer_worker.py")
HOW_TO_GET = {
    "genai": "pip install onnxruntime-genai",
    "transformers": "pip install torch transformers",
    "llama.cpp": "python benchmarks/build_llama_cpp.py FOLDER, then --llama-cpp FOLDER",
}
PRECISIONS = {"int8": (8, ("Q8_0",)), "int4": (4, ("Q4_0", "Q4_1"))}
"""Bits of a weight, and llama.cpp's forms of it; the first drafts too."""
SERVER_FLAGS = ["-c", "4096", "-np", "1", "--no-webui"]
SIMPLE = "--spec-type ngram-simple --spec-ngram-simple-size-n 3 --spec-ngram-simple-size-m 8"
MOD = "--spec-type ngram-mod --spec-ngram-mod-n-match 4 --spec-ngram-mod-n-min 2 --spec-ngram-mod-n-max 8"
DRAFTING = {
    "ngram-mod, its default": ["--spec-default"],
    "ngram-mod, short": MOD.split(),
    "ngram-simple, short": SIMPLE.split(),
}
"""llama-server's ways to draft without a draft model: as it comes, and with sizes that draft in short answers too."""
GENAI_DRAFTING = {"n-gram": {"ngram_size": 4, "max_draft_tokens": 8}}
NOT_LOSSLESS = ("dynamo, T 0.7",)
DYNAMO = {"strategy": "dynamo", "temperature": 0.7, "top_k": 50, "repetition_penalty": 1.0, "backoff_threshold": 0.5}
PREFILL, SHORT, LONG = 512, 64, 1024  # tokens
PAUSE = 0.05  # seconds before a job, in which the one before stops spinning


@dataclass(frozen=True)
class Peer:
    """A process.

    Attributes:
        precision: Which it is compared in.
        name: Of the peer and its model.
        kind: As peer_worker.py takes it.
        model: Its weights.
        python: The interpreter.
        options: Of the worker.
        ways: Ways to decode by name, and what the worker is told of each.
        flags: What was chosen, in words.
    """

    precision: str
    name: str
    kind: str
    model: Path
    python: str
    options: dict[str, Any]
    ways: dict[str, dict[str, Any]]
    flags: str


class Worker:
    """A peer's process, with the model loaded.

    Raises:
        PeerError: It ended.
    """

    def __init__(self, peer: Peer, threads: int):
        command = [peer.python, str(WORKER), peer.kind, str(peer.model), "--threads", str(threads)]
        self._name, self.peak_bytes = peer.name, 0
        self._process = subprocess.Popen(
            [*command, "--options", json.dumps(peer.options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        try:
            ready = self._line()
        except PeerError:
            self.close()
            raise
        self.version, self.load_s = ready["version"], ready["load_s"]

    def ask(self, prompt: list[int], new_tokens: int, way: dict[str, Any], to_the_end: bool = False) -> dict[str, Any]:
        """Return one text, and what it cost."""
        assert self._process.stdin is not None
        time.sleep(PAUSE)
        job = {"prompt": prompt, "new_tokens": new_tokens, "way": way, "to_the_end": to_the_end}
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: so its answer says
        found = self._line()
        self.peak_bytes = found["peak_bytes"]
        return found

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{self._name}: its process ended early: run {' '.join(map(str, self._process.args))}")  # type: ignore[arg-type]
        found: dict[str, Any] = json.loads(line)
        return found


def has(python: str, module: str) -> bool:
    """Tell whether an interpreter has a module."""
    test = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-c", test], capture_output=True).returncode == 0
    except OSError:
        return False


def our_peers(precision: str, plain: Path, heads: Path | None) -> Iterator[Peer]:
    """Start this project, on a plain bundle and on one with further heads."""
    greedy = DECODING["greedy"]
    ways = {PLAIN: greedy | {"strategy": "autoregressive"}, "auto": greedy | {"strategy": "auto"}}
    lookup = greedy | {"strategy": "speculative", "drafter": "lookup"}
    yield Peer(precision, "ours", "dynamo", plain, sys.executable, {}, ways | {"lookup": lookup}, "Engine defaults")
    if heads:
        mask = {} if load_bundle(heads).has_cooccurrence else {"cooccurrence_weight": 0.0}
        ways = {name: greedy | {"strategy": name} for name in ("auto", "speculative")}
        ways[NOT_LOSSLESS[0]] = DYNAMO | mask
        yield Peer(precision, "ours, further heads", "dynamo", heads, sys.executable, {}, ways, "Engine defaults")


def genai_peers(precision: str, plain: Path, own: Callable[[], Path], python: str) -> Iterator[Peer]:
    """Start onnxruntime-genai, on our bundle and on one of its own builder's."""
    ways: dict[str, dict[str, Any]] = {PLAIN: {}, **GENAI_DRAFTING}
    drafting = ", ".join(f"{name}={value}" for name, value in GENAI_DRAFTING["n-gram"].items())
    flags = f"do_sample=False; n-gram: {drafting}"
    for name, model in (("genai, our bundle", plain), ("genai, its own builder's", own())):
        yield Peer(precision, name, "genai", model, python, {}, ways, flags)
    name, flags = "genai, our bundle, its own threads", "do_sample=False, intra_op_num_threads not set"
    yield Peer(precision, name, "genai", plain, python, {"own_threads": True}, {PLAIN: {}}, flags)


def llama_peers(precision: str, forms: dict[str, Path], server: Path) -> Iterator[Peer]:
    """Start llama.cpp's server, a process for every way to draft, as that is said when it starts."""
    for form, model in forms.items():
        kinds: dict[str, list[str]] = {PLAIN: []} | (DRAFTING if form == next(iter(forms)) else {})
        for way, flags in kinds.items():
            options = {"server": str(server), "flags": [*SERVER_FLAGS, *flags]}
            shown = " ".join(options["flags"])
            yield Peer(precision, f"llama.cpp {form}", "llama.cpp", model, sys.executable, options, {way: {}}, shown)


def peers(arguments: argparse.Namespace, precision: str, bundle: Bundle) -> Iterator[Peer]:
    """Yield all peers of a precision that are here; the others are named, with how to get them."""
    bits, forms = PRECISIONS[precision]
    base, work = arguments.model, arguments.work
    pythons = {"genai": sys.executable, "transformers": sys.executable} | dict(arguments.peer_python)
    yield from our_peers(precision, bundle.folder, dict(arguments.heads).get(precision))
    if has(pythons["genai"], "onnxruntime_genai"):
        block = 64 if bits == 8 else 32  # the defaults of `--block-size`

        def own() -> Path:
            return genai_model(pythons["genai"], base, work, bits, block)

        yield from genai_peers(precision, bundle.folder, own, pythons["genai"])
    else:
        left_out("genai")
    if arguments.llama_cpp:
        models = {form: gguf_model(base, work, form, arguments.llama_cpp) for form in forms}
        yield from llama_peers(precision, models, program(arguments.llama_cpp, "llama-server"))
    else:
        left_out("llama.cpp")
    if precision == arguments.ours[0][0]:
        python = pythons["transformers"]
        if has(python, "transformers") and has(python, "torch"):
            flags = "dtype=bfloat16, do_sample=False"
            yield Peer("bf16", "transformers", "transformers", checkpoint(base, work), python, {}, {PLAIN: {}}, flags)
        else:
            left_out("transformers")


def left_out(kind: str) -> None:
    """Say that a peer is not here."""
    print(f"peers: note: left out, {kind}: {HOW_TO_GET[kind]}", file=sys.stderr)


Running = list[tuple[Peer, Worker]]


def in_turn(every: list[Any], turn: int) -> list[Any]:
    """Return all of them, beginning elsewhere each time."""
    shift = turn % len(every)
    return every[shift:] + every[:shift]


def fixed_lengths(running: Running, text: list[int], rounds: int, new_tokens: int) -> list[dict[str, Any]]:
    """Time reading and plain decoding at fixed lengths: a row a peer and measure, with a value a round."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    able = [(peer, worker) for peer, worker in running if PLAIN in peer.ways]
    jobs = {"prefill": (PREFILL, 1), "short": (SHORT, new_tokens), "long": (LONG, new_tokens)}
    for turn in tqdm(range(rounds), desc="fixed lengths", leave=False, disable=None):
        for measure, (past, count) in jobs.items():
            start = turn * SHORT % max(1, len(text) - past)
            prompt = text[start : start + past]
            for peer, worker in in_turn(able, turn):
                found = worker.ask(prompt, count, peer.ways[PLAIN])
                key = (peer.precision, peer.name, measure)
                named_so = {"precision": peer.precision, "peer": peer.name, "measure": measure}
                row = rows.setdefault(key, named_so | {"tokens": [], "seconds": []})
                row["tokens"].append(past if measure == "prefill" else len(found["tokens"]) - found["first"])
                row["seconds"].append(found["first_s"] if measure == "prefill" else found["decode_s"])
    return list(rows.values())


Texts = dict[tuple[str, int], list[int]]


def first_answers(engine: Engine, prompts: dict[str, list[list[int]]], new_tokens: int) -> dict[str, list[int]]:
    """Return how many tokens every answer is to have: what plain decoding writes before its end."""
    lengths: dict[str, list[int]] = {}
    for task, questions in prompts.items():
        for question in questions:
            engine.reset()
            plain = {**DECODING["greedy"], "strategy": "autoregressive"}
            tokens = engine.generate(question, max_new_tokens=new_tokens, **plain).tokens
            ended = tokens[-1] in engine.bundle.eos_token_ids
            lengths.setdefault(task, []).append(max(len(tokens) - ended, LEAST_TOKENS))
    return lengths


def answers(
    running: Running, prompts: dict[str, list[list[int]]], lengths: dict[str, list[int]], texts: dict[str, Texts]
) -> list[dict[str, Any]]:
    """Return every way on every prompt; rows with a value a prompt, and the texts in `texts`, by peer and way."""
    rows: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    able = [(peer, worker, way) for peer, worker in running for way in peer.ways]
    for task, questions in prompts.items():
        for turn, question in enumerate(tqdm(questions, desc=f"{task}", leave=False, disable=None)):
            for peer, worker, way in in_turn(able, turn):
                found = worker.ask(question, lengths[task][turn], peer.ways[way])
                texts.setdefault(f"{peer.precision}/{peer.name}/{way}", {})[task, turn] = found["tokens"]
                named_so = {"precision": peer.precision, "peer": peer.name, "way": way, "task": task}
                empty: dict[str, Any] = {"tokens": [], "seconds": [], "first_s": [], "drafted": 0, "accepted": 0}
                row = rows.setdefault((peer.precision, peer.name, way, task), named_so | empty)
                row["tokens"].append(len(found["tokens"]) - found["first"])
                row["seconds"].append(found["decode_s"])
                row["first_s"].append(found["first_s"])
                row["drafted"] += found["drafted"]
                row["accepted"] += found["accepted"]
    return list(rows.values())


def agreement(texts: dict[str, Texts]) -> list[dict[str, Any]]:
    """Return how far greedy texts agree: with the peer's own plain decoding, and with ours at the same precision."""
    rows = []
    for key, own in texts.items():
        precision, name, way = key.split("/")
        if way in NOT_LOSSLESS:
            continue
        row: dict[str, Any] = {"precision": precision, "peer": name, "way": way, "texts": len(own)}
        for what, other in (("plain", f"{precision}/{name}/{PLAIN}"), ("ours", f"{precision}/ours/{PLAIN}")):
            if other in texts and other != key:
                pairs = [(tokens, texts[other][place]) for place, tokens in own.items()]
                row[f"same_as_{what}"] = sum(a == b for a, b in pairs)
                row[f"in_common_with_{what}"] = sum(common(a, b) for a, b in pairs) / sum(len(b) for _, b in pairs)
        rows.append(row)
    return rows


def common(a: list[int], b: list[int]) -> int:
    """Return tokens at the beginning that are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all figures, as the file holds them."""
    content: dict[str, Any] = {
        "machine": f"{describe_machine()}; Python {platform.python_version()}",
        "taken": arguments.note,
        "model": arguments.model,
        "threads": arguments.threads,
        "conditions": {"rounds": arguments.rounds, "prompts": arguments.prompts, "new_tokens": arguments.new_tokens},
        "peers": [],
        "lengths": [],
        "answers": [],
    }
    texts: dict[str, Texts] = {}
    first = Engine(arguments.ours[0][1], threads=arguments.threads)
    with first as engine:
        prompts = {task: prompts_of(task, engine, arguments.prompts) for task in arguments.tasks}
        lengths = first_answers(engine, prompts, arguments.new_tokens)
        warm_up = prompts_of("chat", engine, None)[1]
        text = [token for prompt in prompts_of("edit", engine, None) for token in prompt][: LONG + SHORT * 8]
    for precision, folder in arguments.ours:
        with ExitStack() as stack:
            running: Running = []
            for peer in peers(arguments, precision, load_bundle(folder)):
                try:
                    worker = Worker(peer, arguments.threads)
                except PeerError as error:
                    print(f"peers: note: left out, {peer.name}: {error}", file=sys.stderr)
                    continue
                stack.callback(worker.close)
                for way in peer.ways.values():
                    worker.ask(warm_up, LEAST_TOKENS, way)
                running.append((peer, worker))
            content["lengths"] += fixed_lengths(running, text, arguments.rounds, arguments.decode)
            content["answers"] += answers(running, prompts, lengths, texts)
            content["peers"] += [described(peer, worker) for peer, worker in running]
    return content | {"agreement": agreement(texts)}


def described(peer: Peer, worker: Worker) -> dict[str, Any]:
    """Return what a peer is and what it took."""
    return {
        "precision": peer.precision,
        "peer": peer.name,
        "ways": list(peer.ways),
        "version": worker.version,
        "flags": peer.flags,
        "bytes": stored_bytes(peer.model),
        "load_s": worker.load_s,
        "peak_bytes": worker.peak_bytes,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", nargs="+", type=named, required=True, metavar="PRECISION=BUNDLE")
    parser.add_argument("--heads", nargs="+", type=named, default=[], metavar="PRECISION=BUNDLE")
    parser.add_argument("-m", "--model", default="smollm2", help="the checkpoint of all of them (default: smollm2)")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="a native build of llama.cpp")
    parser.add_argument("--peer-python", nargs="+", default=[], metavar="NAME=PYTHON", help="of genai, transformers")
    parser.add_argument("--work", type=Path, help="keeps the peers' models (default: in the cache folder)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help="default: all")
    parser.add_argument("--prompts", type=int, default=4, metavar="N", help="of every task (default: 4)")
    parser.add_argument("--new-tokens", type=int, default=64, help="most of an answer (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="of the fixed lengths (default: 5)")
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded behind them (default: 32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of everyone (default: all cores)")
    parser.add_argument("--note", default="", help="kept with the figures: how idle the machine was")
    parser.add_argument("--json", type=Path, required=True, help="write all figures there")
    arguments = parser.parse_args(argv)
    arguments.work = arguments.work or cache_folder() / "peers"
    arguments.peer_python = [text.partition("=")[::2] for text in arguments.peer_python]
    if unknown := sorted({name for name, _ in arguments.ours + arguments.heads} - PRECISIONS.keys()):
        parser.error(f"a bundle is {' or '.join(PRECISIONS)}, as in int8=FOLDER, not {unknown[0]}")
    if unknown := sorted(dict(arguments.peer_python).keys() - {"genai", "transformers"}):
        parser.error(f"--peer-python is for genai and transformers, not {unknown[0]}")
    try:
        content = measured(arguments)
        write_whole(arguments.json, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except DynamoError as error:
        print(f"peers: error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.json}: python benchmarks/peers_page.py makes docs/peers.md of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
