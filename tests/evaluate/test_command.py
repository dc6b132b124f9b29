"""`dynamo-eval` from the command line: whole runs on tiny bundles, going on, and bad input in one line."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dynamo_evaluate import bootstrap, generate
from dynamo_evaluate.cli import main
from dynamo_evaluate.results import Results

BACKEND = ["--provider", "cpu", "--threads", "1"]
SMALL = ["--seeds", "2", "--thresholds", "0.1", "1", "--max-new-tokens", "6", "--limit", "3", *BACKEND]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bootstrap samples: intervals are the matter of other tests."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 50)


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that says what is wrong."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(3):
        (folder / f"{i}.py").write_text(f"def f(x):\n    return x * {i}\n\n" * 8)
    (folder / "short.py").write_text("x")
    return folder


def test_perplexity(pair: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figures = tmp_path / "p.jsonl", tmp_path / "p.json"
    command = ["perplexity", str(pair.multi / "model.onnx"), str(pair.plain), str(text), "--window", "40"]
    command += ["--thresholds", "0.2", "1", "--out", str(out), "--json", str(figures), *BACKEND]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "PPL_1:3" in shown and "multi: PPL_d" in shown and f"3 texts ({text.name})" in shown and "every 20" in shown
    written = json.loads(figures.read_text())
    first, second = written["perplexities"]
    assert first["bundle"] == "multi" and second["bundle"] == "multi-plain"
    assert second["PPL_1"]["value"] == pytest.approx(first["PPL_1"]["value"], rel=0.05)  # nearly the same positions
    assert first["dynamic"]["1"]["PPL_d"]["value"] == pytest.approx(first["PPL_1"]["value"], rel=1e-4)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:3]))
    assert main(command) == 0
    assert capsys.readouterr().out == shown
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert "PPL_1:3" in (tmp_path / "report" / "report.md").read_text()
    capsys.readouterr()
    assert main(["compare", str(out), str(out)]) == 0
    assert "1.0000 [1.0000, 1.0000]" in capsys.readouterr().out


def test_perplexity_of_what_ships(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a bundle and a text it is ours, on held-out modules."""
    command = ["perplexity", "--limit", "2", "--limit-tokens", "120", "--thresholds", "0.5", "--threads", "1"]
    assert main(command) == 0
    assert "2 texts (stdlib)" in " ".join(capsys.readouterr().out.split())


def test_generate_report_and_resume(pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "g.jsonl"
    command = ["generate", str(pair.multi), "--prompts", "paper", "--out", str(out), *SMALL]
    assert main([*command, "--drafter", "lookup"]) == 1
    assert "--drafter is for --also auto and --also speculative" in complaint(capsys)
    command += ["--also", "auto", "--drafter", "lookup"]
    assert main(command) == 0  # plain is the bundle beside it
    shown = capsys.readouterr()
    assert "same-quality speed-up" in shown.out and "3 prompts (paper) × 2 seeds" in " ".join(shown.out.split())
    assert "note" not in shown.err
    lines = out.read_text().splitlines(keepends=True)
    drafting = [setting for setting in json.loads(lines[0])["settings"] if "drafter" in setting]
    assert [(each["name"], each["drafter"]) for each in drafting] == [("auto, lookup", "lookup")]
    out.write_text("".join(lines[:9]))
    assert main(command) == 0
    assert sorted(json.loads(line)["setting"] for line in out.read_text().splitlines()[1:]) == sorted(
        json.loads(line)["setting"] for line in lines[1:]
    )
    capsys.readouterr()
    assert main([*command, "--seeds", "3"]) == 1
    assert "(seeds: 2, now 3)" in complaint(capsys)
    folder = tmp_path / "report"
    assert main(["report", str(out), "--out", str(folder)]) == 0
    names = {f"{name}.{kind}" for name in ("curve", "curve_tokens", "steps") for kind in ("png", "svg")}
    names |= {"report.md", "report.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "report.json").read_text())["bundle"]["name"] == "multi"
    capsys.readouterr()
    assert main(["compare", str(out), str(out)]) == 0
    assert "paired" in capsys.readouterr().out


def test_ablation(pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.jsonl"
    command = ["ablation", str(pair.multi), "--plain", str(pair.plain), "--out", str(out), *SMALL, "--limit", "1"]
    assert main(command) == 0
    variants = {setting["variant"] for setting in Results.load(out).header["settings"]}
    assert {"mask, Otsu, blur", "Otsu, blur", "joint not normalised"} <= variants
    assert main(["report", str(out), "--out", str(tmp_path / "r")]) == 0
    assert {path.name for path in (tmp_path / "r").glob("*.svg")} == {"variants.svg", "variants_tokens.svg"}
    assert "half mask, Otsu, blur" in capsys.readouterr().out


def test_without_a_plain_bundle(pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = shutil.copytree(pair.multi, tmp_path / "alone")
    assert main(["generate", str(alone), "--out", str(tmp_path / "g.jsonl"), *SMALL, "--limit", "1"]) == 0
    assert "no plain bundle is given" in capsys.readouterr().err


def test_interrupted(
    pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "measure", interrupt)
    assert main(["generate", str(pair.multi), "--out", str(tmp_path / "g.jsonl"), *SMALL]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def wrong_inputs(pair: Any, folder: Path) -> list[tuple[list[str], str]]:
    out = ["--out", str(folder / "r.jsonl")]
    multi, plain = str(pair.multi), str(pair.plain)
    (folder / "empty.txt").write_text("\n")
    return [
        (["generate", "nowhere", *out], "nowhere does not exist"),
        (["generate", plain, *out], "strategy dynamo needs a graph with several heads"),
        (["generate", multi, *out, "--draft-tokens", "1"], "no setting reads draft_tokens"),
        (["perplexity", plain, "--temperature", "1"], "temperature is for dynamic perplexities"),
        (["generate", multi, "--plain", multi, *out], "is not a plain bundle: export one with --heads 0"),
        (["generate", multi, "--seeds", "1", *out], "--seeds must be at least 2"),
        (["generate", multi, "--template", "x", *out], "{prompt}"),
        (["generate", multi, "--chat", "--template", "> {prompt}", *out], "leave out --template"),
        (["generate", multi, "--system", "x", *out], "--system and --trust-content are for --chat"),
        (["generate", multi, "--chat", *out], "has no chat template"),
        (["generate", multi, "--max-new-tokens", "0", *out], "--max-new-tokens must be at least 1"),
        (["generate", multi, "--max-new-tokens", "95", *out], "too many for 95 more in a context of 96"),
        (["generate", multi, "--thresholds", "2", *out], "no back-off threshold"),
        (["generate", multi, "--prompts", str(folder / "empty.txt"), *out], "has no prompts"),
        (["generate", multi, "--temperature", "-1", *out], "temperature must be"),
        (["generate", multi, "--max-new-tokens", "4", "--out", str(folder)], "cannot write"),
        (["perplexity", multi, "nowhere.txt"], "no text at 'nowhere.txt'"),
        (["perplexity", multi, "--window", "500"], "a window must have 1 to 96 tokens"),
        (["perplexity", multi, "--window", "8", "--stride", "9"], "the stride must be from 1"),
        (["perplexity", multi, "--limit", "0"], "--limit must be at least 1"),
        (["perplexity", multi, "--limit", "1", "--limit-tokens", "2"], "no text has more than 7 tokens"),
        (["perplexity", multi, "--limit-tokens", "-5"], "--limit-tokens must be at least 1"),
        (["generate", multi, "--limit", "0", *out], "--limit must be at least 1"),
        (["report", "nowhere.jsonl", "--degree", "0"], "--degree must be at least 1"),
        (["report", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["compare", "nowhere.jsonl", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    ]


def test_bad_input_is_one_line(pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in wrong_inputs(pair, tmp_path):
        assert main(arguments) == 1, arguments
        assert message in complaint(capsys), arguments
        assert not (tmp_path / "r.jsonl").exists()


def test_names_the_extra_that_is_missing() -> None:
    code = (
        "import sys; sys.modules['scipy'] = None; from dynamo_evaluate.cli import main; sys.exit(main(['report', 'x']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr == "dynamo-eval: error: this needs scipy: pip install 'dynamo-edge[cpu,eval]'\n"


def test_help_and_version_need_no_extra() -> None:
    """Nor do they wait for what takes long to load."""
    extras = ("scipy", "tqdm", "matplotlib", "openai", "mauve", "lm_eval", "torch")
    for arguments in (["--help"], ["--version"], ["perplexity", "--help"], ["generate", "--help"], ["judge", "--help"]):
        code = (
            f"import sys; sys.modules |= dict.fromkeys({extras}); "
            f"from dynamo_evaluate.cli import main; sys.exit(main({arguments}))"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stderr) == (0, ""), arguments
        assert ended.stdout.startswith(("usage: dynamo-eval", "dynamo-eval "))


@pytest.mark.parametrize("module", ["dynamo_evaluate", "dynamo_evaluate.cli"])
def test_runs_as_a_module(module: str) -> None:
    ended = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    assert ended.stdout == f"dynamo-eval {importlib.metadata.version('dynamo-edge')}\n"


INTERRUPTED = """
import sys

class Impatient:
    def find_spec(self, name, *rest):
        if name == sys.argv[1]:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Impatient())
from dynamo_evaluate.cli import main
sys.exit(main(["report", "x"]))
"""


@pytest.mark.parametrize("module", ["numpy", "dynamo_evaluate.commands", "scipy", "dynamo_evaluate.plots"])
def test_interrupted_while_it_loads(module: str) -> None:
    """At whatever module it is: one line."""
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED, module], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 130
    assert ended.stderr.startswith("dynamo-eval: interrupted") and ended.stderr.count("\n") == 1


SWALLOWED = """
import signal, sys

class Careless:
    def find_spec(self, name, *rest):
        if name == "scipy":
            try:
                signal.raise_signal(signal.SIGINT)
            except:
                pass

sys.meta_path.insert(0, Careless())
from dynamo_evaluate.cli import main
sys.exit(main(["report", "x"]))
"""


def test_an_interrupt_that_a_library_swallows_counts() -> None:
    """Some catch whatever is raised while they load."""
    ended = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 130
    assert ended.stderr.startswith("dynamo-eval: interrupted") and ended.stderr.count("\n") == 1
