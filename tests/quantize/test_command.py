"""`dynamo-quantize` and `dynamo-export --quantize`: what they say, and their exit status."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.naive import outputs, relative

from dynamo_export import cli
from dynamo_graph.files import read_report, version
from dynamo_quantize import cli as quantize_cli
from dynamo_quantize import gates
from dynamo_quantize.gates import GateResult
from dynamo_quantize.schemes import Options
from dynamo_runtime.bundle import load_bundle
from dynamo_runtime.topology import Plain

ExportOf = Callable[[str], Any]
TOKENS = np.random.default_rng(0).integers(1, 320, 24).tolist()


def complaint(capsys: pytest.CaptureFixture[str], command: str = "dynamo-export") -> str:
    """The one line on stderr that says what is wrong."""
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{command}: error:")]
    assert len(errors) == 1
    return errors[0]


def test_from_checkpoint_to_small_bundle(export: ExportOf) -> None:
    """Both stages in one command: the bundle in fp32 is gone, the small one is whole and close to it."""
    exported = export("plain")  # made by the command
    place = exported.folder.parent / "command"
    assert [path.name for path in place.iterdir()] == ["out"]
    bundle = load_bundle(place / "out" / "small.onnx", verify=True)
    assert (bundle.precision, bundle.topology) == ("int8", Plain())
    report = read_report(bundle.folder)
    assert report["parity"]["passed"] and report["gates"]["passed"]
    found = relative(outputs(bundle, TOKENS)["logits"], outputs(exported.bundle, TOKENS)["logits"])
    assert 0 < found < 0.1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "is a bundle already: choose a scheme with --quantize"),
        (["--quantize", "none"], "is a bundle already: choose a scheme with --quantize"),
        (["--heads", "2"], "--heads is settled in a bundle: export the checkpoint again"),
        (["--quantize", "int8", "--heads", "0"], "--heads is settled in a bundle: export the checkpoint again"),
        (["--quantize", "int8", "--drafter", "cp"], "--drafter is settled in a bundle: export the checkpoint again"),
        (["--quantize", "int8", "--context-length", "9"], "--context-length is settled in a bundle"),
        (["--quantize", "int8", "--parity-length", "9"], "--parity-length is settled in a bundle"),
        (["--quantize", "fp16", "--block-size", "32"], "fp16 has one precision for all parts"),
        (["--quantize", "int8", "--gate-text", "/nowhere"], "no text at '/nowhere'"),
        (["--block-size", "32"], "options of quantization need a scheme: --quantize int8"),
        (["--stem-precision", "int8"], "options of quantization need a scheme: --quantize int8"),
        (["--no-symmetric"], "options of quantization need a scheme: --quantize int8"),
        (["--algorithm", "rtn"], "options of quantization need a scheme: --quantize int8"),
        (["--kv-cache", "int8"], "options of quantization need a scheme: --quantize int8"),
        (["--calibration", "."], "options of quantization need a scheme: --quantize int8"),
        (["--gate-text", "."], "options of quantization need a scheme: --quantize int8"),
        (["--max-perplexity-loss", "0"], "options of quantization need a scheme: --quantize int8"),
        (["--max-acceptance-loss", "0"], "options of quantization need a scheme: --quantize int8"),
        (["--allow-degraded"], "options of quantization need a scheme: --quantize int8"),
    ],
)
def test_refusals(
    arguments: list[str], expected: str, export: ExportOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stderr, exit status 1, no file."""
    bundle = export("cp").folder
    capsys.readouterr()
    assert cli.main([str(tmp_path / "out" / "m.onnx"), "-m", str(bundle), *arguments]) == 1
    assert expected in complaint(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_request_costs_no_export(export: ExportOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a checkpoint, what is wrong with the second stage is said before the first, whatever else is wrong."""
    out = str(tmp_path / "m.onnx")
    for arguments, expected in (
        (["--quantize", "int8", "--algorithm", "gptq"], "int8 has no 4-bit parts"),
        (["--quantize", "int8", "--calibration", "/nowhere"], "no text at '/nowhere'"),
        (["--block-size", "64"], "options of quantization need a scheme"),
    ):
        assert cli.main([out, "-m", str(tmp_path / "no such checkpoint"), *arguments]) == 1
        assert expected in complaint(capsys)


def test_a_failed_gate(
    export: ExportOf, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table on stdout, one line on stderr, exit status 1, nothing written; or written, if that is wanted."""
    rows = [GateResult("quality", "PPL_1", 4.0, 4.5, 4.1, False)]
    monkeypatch.setattr(gates, "measure", lambda *arguments: None)
    monkeypatch.setattr(gates, "judge", lambda *arguments, **options: rows)
    bundle = export("cp").folder
    arguments = [str(tmp_path / "out" / "m.onnx"), "-m", str(bundle), "--quantize", "fp16", "--gate-text", str(text)]
    capsys.readouterr()
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert "PPL_1" in captured.out and "FAILED" in captured.out
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("dynamo-export: error: 1 of the 1 limits are not kept (first: PPL_1, 4.5 where 4.1")
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*arguments, "--allow-degraded"]) == 0
    assert load_bundle(tmp_path / "out").degraded


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What reaches `quantize_bundle`, which does nothing."""
    import dynamo_quantize

    found: dict[str, Any] = {}

    def quantize_bundle(source: str, output: str, scheme: str, **options: Any) -> None:
        found.clear()
        found.update(options, source=source, output=output, scheme=scheme)

    monkeypatch.setattr(dynamo_quantize, "quantize_bundle", quantize_bundle, raising=False)
    return found


OPTIONS = shlex.split("""
    --stem-precision int8 --first-head-precision fp32 --heads-precision int4 --output-precision int4
    --input-precision fp32 --block-size 64 --algorithm rtn --no-symmetric --kv-cache fp32 --calibration a
    --gate-text b --max-perplexity-loss 3 --max-acceptance-loss 5 --allow-degraded --overwrite --external-data
""")


def test_every_option_reaches_the_package(export: ExportOf, given: dict[str, Any]) -> None:
    """Each argument of both commands becomes the one it stands for."""
    graph = str(export("cp").folder / "model.onnx")
    expected = {
        "source": graph,
        "output": "out.onnx",
        "scheme": "int4",
        "options": Options(
            parts={"stem": "int8", "first_head": "fp32", "heads": "int4", "output": "int4", "input": "fp32"},
            block_size=64,
            symmetric=False,
            algorithm="rtn",
            kv_cache="fp32",
            perplexity_limit=3.0,
            tokens_per_pass_limit=5.0,
        ),
        "calibration": "a",
        "gate_text": "b",
        "allow_degraded": True,
        "overwrite": True,
        "external_data": True,
    }
    assert cli.main(["out.onnx", "-m", graph, "--quantize", "int4", *OPTIONS]) == 0
    assert given == expected
    given.clear()
    assert quantize_cli.main([graph, "-o", "out.onnx", "--scheme", "int4", *OPTIONS]) == 0
    assert given == expected


@pytest.mark.parametrize(
    ("output", "graph"), [("out", "out/model.onnx"), ("out/small.onnx", "out/small.onnx"), (".", "model.onnx")]
)
def test_output_is_a_folder_or_its_graph(
    output: str, graph: str, export: ExportOf, given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """`-o` of both commands, and the line that one says of the other."""
    bundle = str(export("cp").folder)
    assert quantize_cli.main([bundle, "-o", output, "--scheme", "fp16"]) == 0
    assert given["output"] == graph
    capsys.readouterr()
    assert cli.main(["-m", bundle, "-o", output, "--quantize", "fp16"]) == 0
    assert given["output"] == graph
    assert shlex.split(capsys.readouterr().err.splitlines()[-1])[3] == output


@pytest.mark.parametrize("options", [[], ["--symmetric"], ["--max-perplexity-loss", "0"], OPTIONS], ids=len)
def test_the_note_does_the_same(
    options: list[str], export: ExportOf, given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a bundle, the last line on stderr is a command that reaches the package with the same arguments."""
    odd = tmp_path / "a bundle's $HOME"
    odd.symlink_to(export("cp").folder)
    arguments = ["-m", str(odd), str(tmp_path / "o & o" / "m.onnx"), "--quantize", "int4", *options]
    capsys.readouterr()
    assert cli.main([*arguments, "--calibration", 'it\'s; "all" * text']) == 0
    note, line = capsys.readouterr().err.splitlines()
    assert note == "dynamo-export: note: quantizing a bundle has a command of its own:"
    expected = dict(given)
    given.clear()
    command, *rest = shlex.split(line)
    assert command == "dynamo-quantize"
    assert quantize_cli.main(rest) == 0
    assert given == expected
    assert capsys.readouterr().err == ""


def test_quantize_from_bundle_to_bundle(
    export: ExportOf, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gates' table on stdout, and a whole bundle whose graph is `model.onnx`."""
    exported = export("plain").bundle
    texts = ["--calibration", str(text), "--gate-text", str(text), "--allow-degraded"]
    assert quantize_cli.main([str(exported.folder), "-o", str(tmp_path / "out"), "--scheme", "int8", *texts]) == 0
    assert "PPL_1" in capsys.readouterr().out
    bundle = load_bundle(tmp_path / "out", verify=True)
    assert (bundle.precision, bundle.graph) == ("int8", "model.onnx")
    assert 0 < relative(outputs(bundle, TOKENS)["logits"], outputs(exported, TOKENS)["logits"]) < 0.1


@pytest.mark.parametrize(
    ("bundle", "arguments", "expected"),
    [
        ("nowhere", ["--scheme", "int8"], "does not exist"),
        ("cp", ["--scheme", "fp16", "--block-size", "32"], "fp16 has one precision for all parts"),
        ("cp", ["--scheme", "int8", "--gate-text", "/nowhere"], "no text at '/nowhere'"),
        ("checkpoint", ["--scheme", "int8"], "dynamo_config.json"),
    ],
)
def test_quantize_refuses(
    bundle: str,
    arguments: list[str],
    expected: str,
    export: ExportOf,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line on stderr, exit status 1, no file."""
    source = {"nowhere": tmp_path / "nowhere", "cp": export("cp").folder, "checkpoint": export("cp").checkpoint}[bundle]
    capsys.readouterr()
    assert quantize_cli.main([str(source), "-o", str(tmp_path / "out"), *arguments]) == 1
    assert expected in complaint(capsys, "dynamo-quantize")
    assert list(tmp_path.iterdir()) == []


def test_quantize_refuses_its_own_bundle(export: ExportOf, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of the bundle that is read is no place for the new one."""
    folder = str(export("cp").folder)
    before = sorted(path.name for path in export("cp").folder.iterdir())
    assert quantize_cli.main([folder, "-o", folder, "--scheme", "int8", "--overwrite"]) == 1
    assert "choose another folder for the new one" in complaint(capsys, "dynamo-quantize")
    assert sorted(path.name for path in export("cp").folder.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    ["", "bundle", "bundle -o out", "bundle -o out --scheme int9", "bundle -o out --scheme int8 --heads 0"],
)
def test_quantize_usage(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What argparse refuses ends with its status and one line."""
    with pytest.raises(SystemExit) as ended:
        quantize_cli.main(arguments.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("dynamo-quantize: error: ")


LIGHT = """
import importlib, sys
try:
    importlib.import_module(sys.argv[1]).main(sys.argv[2:])
except SystemExit as ended:
    assert not ended.code
assert not {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime"} & set(sys.modules), "heavy imports"
"""


@pytest.mark.parametrize("command", ["dynamo-export", "dynamo-quantize"])
@pytest.mark.parametrize("question", ["--version", "--help"])
def test_questions_are_answered_at_once(command: str, question: str) -> None:
    """Version and help import nothing heavy."""
    module = command.replace("-", "_") + ".cli"
    done = subprocess.run([sys.executable, "-c", LIGHT, module, question], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "usage: " + command if question == "--help" else f"{command} {version('dynamo-edge')}"
    )


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from dynamo_export.cli import main
sys.exit(main(sys.argv[1:]))
"""
WITHOUT_ONNX = """
import sys
sys.modules["onnx_ir"] = None
from dynamo_quantize.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    """Without torch, what is no bundle needs the extra that has it: one line, and nothing written."""
    arguments = [str(tmp_path / "o" / "m.onnx"), "-m", str(tmp_path / "missing"), "--quantize", "int8"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "pip install 'dynamo-edge[cpu,export]'" in done.stderr
    assert not (tmp_path / "o").exists()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ONNX, str(tmp_path / "missing"), "-o", str(tmp_path / "o"), "--scheme", "int8"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "pip install 'dynamo-edge[cpu,quantize]'" in done.stderr
    assert not (tmp_path / "o").exists()
