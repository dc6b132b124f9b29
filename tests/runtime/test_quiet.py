"""What commands do unasked: nothing. No telemetry, and no files but where ours are kept."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = [sys.executable, "-m", "dynamo_runtime"]
FLAGS = ["def", "--max-new-tokens", "4", "--threads", "1"]
WRITING = "open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,connect,sendto,sendmmsg"


def surroundings(tmp_path: Path, **more: str) -> dict[str, str]:
    """An environment with an empty home, and without what a user may have said of telemetry."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "HF_", "MPL", "XDG_"))}
    return kept | {"HOME": str(home), "DYNAMO_CACHE": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"} | more


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_a_run_writes_nothing_and_asks_for_no_host(multi: Path, tmp_path: Path) -> None:
    """Seen from the kernel, as what is not Python does not ask Python."""
    log = tmp_path / "log"
    traced = ["strace", "-f", "-qq", "-o", str(log), "-e", "signal=none", "-e", f"trace={WRITING}"]
    done = subprocess.run(
        [*traced, *RUN, str(multi), *FLAGS], env=surroundings(tmp_path), capture_output=True, timeout=120, check=False
    )
    if b"ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    calls = [line for line in log.read_text(errors="replace").splitlines() if " = -1 " not in line]
    assert any("tokenizer.json" in call for call in calls)  # it is the right process
    changes = [call for call in calls if "open" not in call or re.search("O_WRONLY|O_RDWR|O_CREAT", call)]
    allowed = ("/dev/", "/proc/", "resumed>", "/cache/", '/cache"')
    assert [call for call in changes if not any(word in call for word in allowed)] == []
    assert not any("AF_INET" in call for call in calls)
    assert list((tmp_path / "home").rglob("*")) == []


def test_an_engine_that_lives_for_a_while_stays_quiet(multi: Path, tmp_path: Path) -> None:
    """The native library would begin seconds later."""
    script = (
        "import sys, time; from dynamo_runtime import Engine; engine = Engine(sys.argv[1], threads=1);"
        "engine.generate('def', max_new_tokens=2); time.sleep(3)"
    )
    environment = surroundings(tmp_path)
    subprocess.run([sys.executable, "-c", script, str(multi)], env=environment, timeout=120, check=True)
    assert list((tmp_path / "home").rglob("*")) == []


def test_the_user_has_the_last_word(tmp_path: Path) -> None:
    script = "import os; from dynamo_runtime.providers import import_onnxruntime; import_onnxruntime();"
    script += "print(*(os.environ[name] for name in ('ORT_DISABLE_TELEMETRY', 'HF_HUB_DISABLE_TELEMETRY')))"
    for index, (given, expected) in enumerate((({}, "1 1\n"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "1 0\n"))):
        folder = tmp_path / str(index)
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=surroundings(folder, **given),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == expected


def test_a_page_is_made_where_the_home_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    environment = surroundings(tmp_path) | {"HOME": "/proc/nowhere"}
    script = "from dynamo_runtime.profiling.page import check_extra; check_extra(); import matplotlib.font_manager"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=120, check=True)
    assert done.stderr == b""
    assert (tmp_path / "cache" / "matplotlib").is_dir()
