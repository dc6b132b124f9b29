"""Which package may import which: the contract in pyproject.toml, held against the code."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("model", "train", "export", "quantize", "graph", "runtime", "evaluate")
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """Check the packages below a folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(root / folder) for folder in FOLDERS)}
    return subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_imports_go_one_way() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "upward"),
    [
        ("runtime/dynamo_runtime/session.py", "import dynamo_graph.read"),
        ("runtime/dynamo_runtime/device/plan.py", "from ..engine import Engine"),
        ("runtime/dynamo_runtime/engine.py", "import torch"),
        ("graph/dynamo_graph/read.py", "import dynamo_quantize.schemes"),
        ("evaluate/dynamo_evaluate/report.py", "import dynamo_export"),
        ("train/dynamo_train/loop.py", "import dynamo_export.errors"),
        ("model/dynamo_model/joint.py", "import dynamo_runtime.names"),
        ("quantize/dynamo_quantize/gates.py", "import dynamo_export.errors"),
        ("runtime/dynamo_runtime/profiling/trials.py", "from ..cli import run"),
        ("runtime/dynamo_runtime/parallel.py", "from .bundle import Bundle"),
        ("runtime/dynamo_runtime/chat.py", "from .engine import Engine"),
    ],
)
def test_an_import_that_goes_up_is_found(tmp_path: Path, module: str, upward: str) -> None:
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=lambda at, names: [n for n in names if n == "default"])
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    (tmp_path / module).write_text(f"{(tmp_path / module).read_text()}\n{upward}\n")
    done = lint(tmp_path)
    assert done.returncode == 1
    assert "BROKEN" in done.stdout
