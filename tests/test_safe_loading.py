"""Nothing that is loaded may run a program of its own: no code from checkpoints, no pickles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("model", "train", "export", "quantize", "graph", "runtime", "evaluate")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
PICKLES = {"pickle.load", "pickle.loads", "torch.load", "joblib.load", "load_state", "dill.load"}


def faults(source: str) -> Iterator[str]:
    """Calls that load what may bring a program along, without forbidding it."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {each.arg: ast.unparse(each.value) for each in node.keywords}
        owner, _, method = called.rpartition(".")
        remote = method in ("from_pretrained", "from_config") and owner.rpartition(".")[2].startswith("Auto")
        if (remote or "trust_remote_code" in given) and given.get("trust_remote_code") != "False":
            yield f"line {node.lineno}: {called} without trust_remote_code=False"
        if called in PICKLES or method in PICKLES or given.get("allow_pickle", "False") != "False":
            yield f"line {node.lineno}: {called} unpickles"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_loaded_runs_nothing(path: Path) -> None:
    assert list(faults(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "bad",
    [
        "AutoModel.from_pretrained(path)",
        "transformers.AutoModelForCausalLM.from_config(config, **options)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "AutoConfig.from_pretrained(path, trust_remote_code=flag)",
        "load_dataset(name, trust_remote_code=True)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "accelerator.load_state(folder)",
    ],
)
def test_a_call_that_could_is_found(bad: str) -> None:
    assert len(list(faults(bad))) == 1
    assert list(faults("AutoModel.from_pretrained(path, trust_remote_code=False); np.load(path)")) == []
