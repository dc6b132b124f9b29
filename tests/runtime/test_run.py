"""The command as a process: what goes to stdout and stderr, signals, pipes, and what gets imported."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_runtime import Engine
from dynamo_runtime.cli import run as command
from dynamo_runtime.cli.run import Side

RUN = [sys.executable, "-m", "dynamo_runtime.cli.run"]
FLAGS = ["--seed", "3", "--max-new-tokens", "20", "--threads", "1"]


def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*RUN, *arguments], input=stdin, capture_output=True, timeout=60, check=False)


def test_stdout_has_the_text_and_nothing_else(multi: Path) -> None:
    expected = Engine(multi, threads=1).generate("def fib(n):", strategy="dynamo", seed=3, max_new_tokens=20).text
    done = run(str(multi), "def fib(n):", "--strategy", "dynamo", *FLAGS)
    assert done.returncode == 0
    assert done.stdout.decode() == expected
    assert re.fullmatch(
        r"dynamo: \d+ prompt tokens, \d+ new in \d+ rounds \([\d.]+ a pass; steps [\d: ]+\), "
        r"\d+ of \d+ draft tokens accepted \(by depth [\d% ]+\), "
        r"first token [\d.]+ ms, [\d.]+ tokens/s, onnxruntime [\d.]+ s, outside [\d.]+ s\n",
        done.stderr.decode(),
    )


def test_prompt_from_stdin(multi: Path) -> None:
    prompt = "größer 日本\n"
    expected = Engine(multi, threads=1).generate(prompt, seed=3, max_new_tokens=20).text
    assert run(str(multi.parent), "-", *FLAGS, stdin=prompt.encode()).stdout.decode() == expected
    broken = run(str(multi), "-", stdin=b"\xff\xfe")
    assert broken.returncode == 1
    assert broken.stderr == b"dynamo-run: error: the prompt on stdin is not valid UTF-8\n"
    assert run(str(multi), "-").stderr == b"dynamo-run: error: the prompt is empty\n"


def test_flags_reach_the_engine(multi: Path) -> None:
    done = run(str(multi), "x", "--strategy", "autoregressive", "--temperature", "0", *FLAGS)
    assert done.stderr.startswith(b"autoregressive: ")
    text = Engine(multi, threads=1).generate("x", strategy="autoregressive", temperature=0, max_new_tokens=20).text
    assert done.stdout.decode() == text
    one = run(str(multi), "x", "--strategy", "dynamo", "--backoff-threshold", "1", *FLAGS)
    assert re.search(rb"steps 1:\d+\)", one.stderr)


def test_control_tokens_in_prompts_and_texts(multi: Path) -> None:
    prompt = "\ufeffx <|endoftext|>"  # a byte-order mark, too
    engine, options = Engine(multi, threads=1), {"seed": 3, "max_new_tokens": 20}
    for flags, more in (([], {}), (["--plain-prompt"], {"plain_prompt": True}), (["--show-special"], {})):
        done = run(str(multi), "-", *flags, *FLAGS, stdin=prompt.encode())
        assert done.stdout.decode() == engine.generate(prompt[1:], **options, **more).text, done.stderr
        tokens = len(engine.encode(prompt[1:], **more))
        assert f" {tokens} prompt tokens" in done.stderr.decode()
        engine.reset()


def test_compare_prints_a_ratio(multi: Path, plain: Path) -> None:
    dynamo = ["--strategy", "dynamo"]
    done = run(str(multi), "x", "--compare", "--compare-with", str(plain), "--repeats", "1", *dynamo, *FLAGS)
    statistics, comparison = done.stderr.decode().splitlines()
    assert statistics.startswith("dynamo: ")
    pattern = r"compare: dynamo ([\d.]+) tokens/s, plain \((.*)\) ([\d.]+) tokens/s, ratio ([\d.]+) .*"
    match = re.fullmatch(pattern, comparison)
    assert match
    assert match[2] == str(plain.parent)
    assert float(match[4]) == pytest.approx(float(match[1]) / float(match[3]), abs=0.01)
    without = run(str(multi), "x", "--compare", "--repeats", "1", *FLAGS).stderr.decode()
    assert "autoregressive on the same bundle (no plain bundle found" in without


@pytest.mark.parametrize(("strategy", "penalty"), [("dynamo", 1.1), ("auto", 1.3)])
def test_compare_names_the_same_parameters_for_both_sides(
    copied, monkeypatch: pytest.MonkeyPatch, strategy: str, penalty: float
) -> None:
    """Those of the strategy at hand: the paper's, or the bundle's; and what the user names."""
    copied.edit(sampling={"repetition_penalty": 1.3, "temperature": 2.0})
    sides: list[Side] = []
    monkeypatch.setattr(command, "_compare", lambda ours, plain, *rest: sides.extend([ours, plain]) or "compared")
    flags = ["--compare", "--strategy", strategy, "--top-k", "9", *FLAGS]
    assert command.main([str(copied.folder), "x", *flags]) == 0
    ours, plain = sides
    assert (ours.strategy, plain.strategy) == (strategy, "autoregressive")
    assert (plain.options["repetition_penalty"], plain.options["top_k"]) == (penalty, 9) and ours.options["top_k"] == 9
    assert plain.options["temperature"] == (0.7 if strategy == "dynamo" else 2.0)


def test_compare_finds_the_plain_sibling(multi: Path, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(multi.parent)
    real = Path(f"{multi.parent}-plain")
    real.symlink_to(plain.parent)
    try:
        done = run(str(tmp_path / "model"), "x", "--compare", "--repeats", "1", *FLAGS)
    finally:
        real.unlink()
    assert f"plain ({real})" in done.stderr.decode()


def test_a_closed_pipe_is_no_error(multi: Path) -> None:
    process = subprocess.Popen(
        [*RUN, str(multi), "x", "--strategy", "dynamo", "--max-new-tokens", "600", "--seed", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 141


def test_an_interrupt_ends_the_text_and_still_reports(multi: Path) -> None:
    code = (
        "import signal, sys, dynamo_runtime.cli.run as run, dynamo_runtime.stream as stream\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "count = stream.Statistics.count_round\n"
        "def once(self, *given):\n"
        "    if self.new_tokens > 20: signal.raise_signal(signal.SIGINT)\n"
        "    count(self, *given)\n"
        "stream.Statistics.count_round = once\n"
        "sys.exit(run.main(sys.argv[1:]))\n"
    )
    arguments = [
        str(multi),
        "x",
        "--strategy",
        "dynamo",
        "--max-new-tokens",
        "600",
        "--seed",
        "1",
        "--temperature",
        "3",
    ]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, timeout=60, check=False)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stdout
    assert b"Traceback" not in done.stderr
    assert re.match(rb"dynamo: 1 prompt tokens, 2\d new", done.stderr)


def test_imports_nothing_of_the_host_side(multi: Path) -> None:
    code = (
        "import sys\nfrom dynamo_runtime import Engine\n"
        "assert 'onnxruntime' not in sys.modules, 'loaded before it is needed'\n"
        "Engine(sys.argv[1]).generate('x', max_new_tokens=3)\nimport dynamo_runtime.cli.run\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(multi)], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"onnxruntime", "numpy", "tokenizers"} <= loaded
    assert not loaded & {
        "torch",
        "jinja2",
        "onnx",
        "transformers",
        "safetensors",
        "onnxscript",
        "optimum",
        "datasets",
        "accelerate",
        "dynamo_model",
        "dynamo_train",
        "dynamo_export",
    }
