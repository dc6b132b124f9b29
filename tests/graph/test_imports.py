"""Which package may import which: runtime ← graph ← quantize ← export."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"model", "train", "export", "quantize", "graph", "runtime", "evaluate"}
BELOW = {"runtime": set(), "graph": {"runtime"}, "quantize": {"runtime", "graph"}}


def imported(package: str) -> set[str]:
    """Top-level names that a package imports, anywhere in it."""
    found = set()
    for path in (ROOT / package / f"dynamo_{package}").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
                found.add(node.module)
    return {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("package", BELOW)
def test_imports_go_one_way(package: str) -> None:
    allowed = {f"dynamo_{name}" for name in BELOW[package] | {package}}
    assert imported(package) & {f"dynamo_{name}" for name in OURS} <= allowed
    assert "torch" not in imported(package)


def test_graph_stands_on_little() -> None:
    assert imported("graph") - sys.stdlib_module_names == {"onnx", "onnx_ir", "numpy", "tqdm", "dynamo_runtime"}
