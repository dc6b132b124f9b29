r"""One peer of `benchmarks/peers.py` in a process of its own: jobs come and answers go as JSON, one a line.

    PYTHON benchmarks/peer_worker.py KIND MODEL [--threads N] [--options JSON]

KIND is `dynamo`, `genai`, `transformers` or `llama.cpp`; PYTHON is the interpreter that has the peer, and needs nothing
else.  MODEL is a bundle, a folder of onnxruntime-genai, a checkpoint or a GGUF file; for llama.cpp the options name
the `server` program and its `flags`, and with `own_threads` genai runs on as many threads as it takes by itself.

The first line out says that the model is loaded: {"version", "load_s"}.  A job is {"prompt": [token ids], "new_tokens":
n, "way": {options of the decoding}, "to_the_end": whether an end-of-sequence token ends it}, and what it gives
{"tokens", "first_s": from the prompt to the first token, "decode_s": from there to the last token, "drafted",
"accepted", "peak_bytes": of the process since its start}.  Where the first pass gave more than one token, `first`
says how many.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

START_SECONDS = 120.0


def peak_bytes(process: int | str) -> int:
    """Most memory a process has had at once, in bytes; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


class Peer:
    """What all have in common: when the model was there, whose version it is, and the memory it took."""

    load_s: float
    version: str

    def peak(self) -> int:
        """Of this process."""
        return peak_bytes("self")

    def close(self) -> None:
        """End what was started besides."""


class Ours(Peer):
    """This project's engine; a way is the keyword arguments of `Engine.generate`."""

    def __init__(self, model: str, threads: int, options: dict[str, Any]):
        runtime = importlib.import_module("dynamo_runtime")
        importlib.import_module("onnxruntime")
        started = time.perf_counter()
        self._engine = runtime.Engine(model, provider="cpu", threads=threads)
        self.load_s = time.perf_counter() - started
        planned = "a profile of this machine" if self._engine.profile else "rules of thumb"
        self.version = f"{runtime.__version__}, auto plans by {planned}"

    def run(self, prompt: list[int], count: int, way: dict[str, Any], to_the_end: bool) -> dict[str, Any]:
        """Return one text."""
        self._engine.reset()
        found = self._engine.generate(prompt, max_new_tokens=count, seed=0, ignore_eos=not to_the_end, **way)
        spent = found.statistics
        return {
            "tokens": found.tokens,
            "first": spent.first_tokens,
            "first_s": spent.ttft_s,
            "decode_s": spent.total_s - spent.ttft_s,
            "drafted": sum(spent.proposed_at_depth),
            "accepted": sum(spent.accepted_at_depth),
        }


class Genai(Peer):
    """onnxruntime-genai; a way is its speculative options."""

    def __init__(self, model: str, threads: int, options: dict[str, Any]):
        importlib.import_module("onnxruntime")  # onnxruntime-genai takes the library that is loaded already
        self._genai = importlib.import_module("onnxruntime_genai")
        started = time.perf_counter()
        config = self._genai.Config(model)
        if not options.get("own_threads"):
            config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = self._genai.Model(config)
        self.load_s = time.perf_counter() - started
        self.version = self._genai.__version__

    def run(self, prompt: list[int], count: int, way: dict[str, Any], to_the_end: bool) -> dict[str, Any]:
        """Return one text; without `to_the_end`, end-of-sequence tokens are kept from being chosen."""
        length = len(prompt) + count
        parameters = self._genai.GeneratorParams(self._model)
        least = {} if to_the_end else {"min_length": length}
        parameters.set_search_options(max_length=length, do_sample=False, **least)
        if way:
            parameters.set_speculative_options(**way)
        tokens: list[int] = []
        started = time.perf_counter()
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(prompt)
        first = started
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            if len(tokens) == 1:
                first = time.perf_counter()
        ended = time.perf_counter()
        found = {"tokens": tokens, "first": 1, "first_s": first - started, "decode_s": ended - first}
        spent = generator.get_speculative_stats() if way else {}
        names = {"drafted": "draft_tokens_proposed", "accepted": "draft_tokens_accepted"}
        return found | {name: spent.get(theirs, 0) for name, theirs in names.items()}


class Transformers(Peer):
    """Hugging Face transformers in bf16; a way is further arguments of `generate`."""

    def __init__(self, model: str, threads: int, options: dict[str, Any]):
        self._torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
        self._torch.set_num_threads(threads)
        started = time.perf_counter()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=self._torch.bfloat16).eval()
        self.load_s = time.perf_counter() - started
        self.version = f"{transformers.__version__}, torch {self._torch.__version__}"

    def run(self, prompt: list[int], count: int, way: dict[str, Any], to_the_end: bool) -> dict[str, Any]:
        """Return one text; without `to_the_end`, end-of-sequence tokens are kept from being chosen."""
        times: list[float] = []

        class Clock:
            def put(self, value: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        least = {} if to_the_end else {"min_new_tokens": count}
        ids = self._torch.tensor([prompt])
        started = time.perf_counter()
        with self._torch.inference_mode():
            found = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                streamer=Clock(),
                **least,
                **way,
            )
        tokens = found[0, len(prompt) :].tolist()
        # the first call is for the prompt
        first, last = times[1] - started, times[-1] - started
        return {"tokens": tokens, "first": 1, "first_s": first, "decode_s": last - first, "drafted": 0, "accepted": 0}


class LlamaCpp(Peer):
    """llama-server of llama.cpp, spoken to over HTTP and timed by its own clock; how it drafts is said at its start."""

    def __init__(self, model: str, threads: int, options: dict[str, Any]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._address = f"http://127.0.0.1:{port}"
        command = [options["server"], "-m", model, "--port", str(port), "-t", str(threads), *options["flags"]]
        started = time.perf_counter()
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        while not self._healthy():
            if self._server.poll() is not None or time.perf_counter() - started > START_SECONDS:
                self.close()
                sys.exit(f"llama-server did not start: {' '.join(command)}")
            time.sleep(0.005)
        self.load_s = time.perf_counter() - started
        shown = subprocess.run([options["server"], "--version"], capture_output=True, text=True)
        lines = (shown.stdout + shown.stderr).splitlines()
        self.version = next((line.removeprefix("version: ") for line in lines if line.startswith("version")), "?")

    def close(self) -> None:
        """End the server."""
        self._server.terminate()
        self._server.wait()

    def run(self, prompt: list[int], count: int, way: dict[str, Any], to_the_end: bool) -> dict[str, Any]:
        """Return one text; without `to_the_end`, end-of-sequence tokens are kept from being chosen."""
        job = {"prompt": prompt, "n_predict": count, "temperature": 0.0, "samplers": ["temperature"]}
        job |= {"cache_prompt": False, "return_tokens": True, "ignore_eos": not to_the_end}
        request = urllib.request.Request(
            f"{self._address}/completion", json.dumps(job).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            found = json.load(answer)
        spent = found["timings"]
        return {
            "tokens": found["tokens"],
            "first": 1,
            "first_s": spent["prompt_ms"] / 1e3,
            "decode_s": spent["predicted_ms"] / 1e3,
            "drafted": spent.get("draft_n", 0),
            "accepted": spent.get("draft_n_accepted", 0),
        }

    def peak(self) -> int:
        """Of the server."""
        return peak_bytes(self._server.pid)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._address}/health") as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError):
            return False


KINDS: dict[str, Any] = {"dynamo": Ours, "genai": Genai, "transformers": Transformers, "llama.cpp": LlamaCpp}


def main() -> None:
    """Load, and answer jobs until there are no more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON")
    arguments = parser.parse_args()
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    peer = KINDS[arguments.kind](arguments.model, arguments.threads, arguments.options)
    try:
        print(json.dumps({"version": peer.version, "load_s": peer.load_s}), file=out)
        for line in sys.stdin:
            job = json.loads(line)
            found = peer.run(job["prompt"], job["new_tokens"], job.get("way", {}), job.get("to_the_end", False))
            print(json.dumps(found | {"peak_bytes": peer.peak()}), file=out)
    finally:
        peer.close()


if __name__ == "__main__":
    main()
