"""Commands whose stdin, stdout or stderr is closed, full or somewhere else, and what terminals are spared."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import chats, profiles

from dynamo_runtime import BundleError, Engine
from dynamo_runtime.cli import profile as profiling
from dynamo_runtime.cli import run
from dynamo_runtime.errors import printable

RUN = [sys.executable, "-m", "dynamo_runtime"]
FLAGS = ["--seed", "3", "--max-new-tokens", "8", "--threads", "1", "--strategy", "autoregressive"]


def shell(redirected: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command with what a shell does to its streams."""
    command = ["sh", "-c", f'exec "$@" {redirected}', "sh", *RUN, *arguments]
    return subprocess.run(command, capture_output=True, timeout=60, check=False, **options)


def test_closed_and_full_streams(multi: Path) -> None:
    arguments = [str(multi), "def", *FLAGS]
    whole = shell("", *arguments)
    assert whole.returncode == 0 and whole.stdout and whole.stderr
    for without in ("2>&-", "2>/dev/full", "<&-", "2>&- <&-"):
        done = shell(without, *arguments)
        assert (done.returncode, done.stdout) == (0, whole.stdout), without
    for redirected, message in (
        (">&-", b"stdout is closed: there is nowhere to write to"),
        ("<&- >&-", b"stdout is closed: there is nowhere to write to"),
        (">/dev/full", b"cannot write the text: No space left on device"),
    ):
        done = shell(redirected, *arguments)
        assert (done.returncode, done.stderr) == (1, b"dynamo-run: error: " + message + b"\n"), redirected
    assert shell(">&- 2>&-", *arguments).returncode == 1


def test_complaints_that_nobody_can_read(multi: Path) -> None:
    for without in ("2>&-", "2>/dev/full"):
        done = shell(without, str(multi), "def", "--temperature", "-1")
        assert (done.returncode, done.stdout) == (1, b"")
        assert shell(without, "--no-such-flag").returncode == 2


@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_a_stdin_that_cannot_be_read(multi: Path, tmp_path: Path, chat: list[str]) -> None:
    arguments = ["-m", str(multi), *FLAGS, *(chat or ["-p", "-"])]
    if chat:
        arguments[1] = str(chats.write_bundle(tmp_path / "bundle", "smollm2"))
    for redirected, message in (("<&-", b"stdin is closed"), ("0>/dev/null", b"stdin cannot be read: ")):
        done = shell(redirected, *arguments)
        assert done.returncode == 1 and done.stdout == b""
        assert done.stderr.splitlines()[-1].startswith(b"dynamo-run: error: " + message)
        assert b"Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="root may search any folder")
def test_folders_that_may_not_be_searched(multi: Path, tmp_path: Path) -> None:
    """Nothing of it is about the text, which is what `dynamo-run` writes."""
    hidden = Path("/tmp") / f"dynamo-hidden-{os.getpid()}"
    try:
        shutil.copytree(multi.parent, hidden / "bundle")
        shutil.copytree(multi.parent, hidden / "seen")
        hidden.chmod(0o755)
        (hidden / "bundle").chmod(0o600)
        nobody = ["setpriv", "--reuid=65534", "--clear-groups"]
        environment = os.environ | {"HOME": "/nonexistent", "DYNAMO_PROFILES": str(hidden / "bundle")}
        for folder, code in (("bundle", 1), ("seen", 0)):
            done = subprocess.run(
                [*nobody, *RUN, str(hidden / folder), "def", *FLAGS],
                env=environment, capture_output=True, text=True, timeout=60, check=False, cwd="/",
            )  # fmt: skip
            if "No module named" in done.stderr or "can't open" in done.stderr:
                pytest.skip("nobody may not read the package either")
            assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
            assert "cannot write" not in done.stderr
    finally:
        shutil.rmtree(hidden)


def test_an_unreadable_profile_is_no_error(multi: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(
        Path,
        "is_file",
        lambda path: refused(path) if path.suffix == ".json" and "-ort" in path.name else os.path.isfile(path),
    )
    assert Engine(multi, threads=1).profile is None
    assert "cannot be read: Permission denied" in caplog.text


def test_an_error_of_a_file_is_not_one_of_the_text(
    multi: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*given: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/locked/model.onnx")

    for command in (run, profiling):
        monkeypatch.setattr(command, "Engine" if command is run else "load_bundle", refused)
        assert command.main([str(multi), *(["x"] if command is run else [])]) == 1
        assert capsys.readouterr().err == f"{command.PROG}: error: /locked/model.onnx: Permission denied\n"


@pytest.mark.parametrize("command", ["run", "profile"])
@pytest.mark.parametrize("delay", [0.01, 0.03, 0.1, 0.2])
def test_ctrl_c_during_the_imports(multi: Path, command: str, delay: float) -> None:
    """Whatever is being imported then."""
    script = (
        "import sys; from dynamo_runtime.cli import entry; print('here', flush=True);"
        f"sys.argv[1:] = [{str(multi)!r}] + ['x'] * ({command!r} == 'run'); sys.exit(entry.{command}())"
    )
    started = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert started.stdout is not None and started.stdout.readline() == b"here\n"
    time.sleep(delay)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    # A shell calls both 130; the second is how Python itself ends where it has not come to our code yet.
    assert started.returncode in (130, -signal.SIGINT) and b"Traceback" not in err


@pytest.mark.parametrize("command", ["quantize", "export", "train"])
@pytest.mark.parametrize("delay", [0.01, 0.05])
def test_ctrl_c_during_the_imports_of_the_others(command: str, delay: float) -> None:
    script = f"import sys; from dynamo_runtime.cli import entry; print('here', flush=True); sys.exit(entry.{command}())"
    started = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert started.stdout is not None and started.stdout.readline() == b"here\n"
    time.sleep(delay)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    ended = started.returncode in (130, -signal.SIGINT)
    # By then it may have found that it has no arguments.  An interrupt in a callback of the interpreter's own import
    # lock is lost there, and the interpreter says so.
    lost = err.startswith(b"Exception ignored in: <function _get_module_lock")
    assert (ended or started.returncode in (1, 2)) and (lost or b"Traceback" not in err)


@pytest.mark.parametrize("module", ["dynamo_quantize.cli nowhere -o out --scheme int8", "dynamo_train.train counts x"])
def test_complaints_never_go_to_stdout(module: str, tmp_path: Path) -> None:
    more = " --data y" if "train" in module else ""
    command = f"{sys.executable} -m {module}{more} 2>&-"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"")


def test_the_entry_imports_next_to_nothing() -> None:
    heavy = {"numpy", "tokenizers", "onnxruntime", "argparse", "dynamo_runtime.engine"}
    script = f"import sys; import dynamo_runtime.cli.entry; sys.exit(str({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == "set()\n"


def test_all_that_is_public_is_there() -> None:
    import dynamo_runtime

    assert all(hasattr(dynamo_runtime, name) for name in dynamo_runtime.__all__)
    assert set(dynamo_runtime._MODULES) < set(dynamo_runtime.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Psychic'"):
        _ = dynamo_runtime.Psychic


EVIL = "evil\x1b[2J\x1b]0;title\x07\u202egnp"


def test_names_move_no_cursor(multi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / EVIL
    shutil.copytree(multi.parent, folder)
    manifest = json.loads((folder / "dynamo_config.json").read_text())
    assert run.main([str(folder), "def", *FLAGS[:-2]]) == 0  # with a note that names it
    seen = [capsys.readouterr().err]
    for field, value in (("precision", EVIL), ("kv_heads", EVIL), ("graph", EVIL)):
        (folder / "dynamo_config.json").write_text(json.dumps(manifest | {field: value}))
        run.main([str(folder), "def", *FLAGS])
        profiling.main([str(folder), "--plain", str(folder)])
        seen.append(capsys.readouterr().err)
    assert run.main([f"{EVIL}/x", "def"]) == 1
    with pytest.raises(SystemExit):
        run.main(["x", "--temperature", EVIL])
    seen.append(capsys.readouterr().err)
    assert all("evil\\x1b[2J" in text for text in (seen[0], seen[-1]))
    assert all(character.isprintable() or character == "\n" for text in seen for character in text)
    assert "\x1b" not in str(BundleError(EVIL)) and printable(printable(EVIL)) == printable(EVIL)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> str:
    """What `dynamo-profile` is spared to measure; the bundle's name in it."""
    found = profiles.full()
    monkeypatch.setattr(profiling, "measure", lambda *given, **options: found)
    return found.bundle.name


def test_a_profile_that_cannot_be_kept_is_shown(
    multi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], measured: str
) -> None:
    """Told before it is measured, if that can be foreseen, and in the end."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DYNAMO_PROFILES", str(tmp_path / "file"))
    assert profiling.main([str(multi), "--json", str(tmp_path / "p.json")]) == 1
    out, err = capsys.readouterr()
    assert measured in out and (tmp_path / "p.json").is_file()
    note, *_, last = err.splitlines()
    assert note.startswith("dynamo-profile: note: the profile cannot be kept (cannot write ")
    assert last.startswith("dynamo-profile: error: cannot write ") and "kept for dynamo-run in" not in err


def test_what_cannot_be_written_takes_nothing_else_along(
    multi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], measured: str
) -> None:
    monkeypatch.setenv("DYNAMO_PROFILES", str(tmp_path / "profiles"))
    table = tmp_path / "t.csv"
    monkeypatch.setattr(profiling, "to_csv", lambda profile: (table.mkdir(), "")[1])  # while it was measured
    assert profiling.main([str(multi), "--csv", str(table)]) == 1
    out, err = capsys.readouterr()
    assert measured in out and "kept for dynamo-run in" in err and f"cannot write {table}" in err.splitlines()[-1]
    assert len(list((tmp_path / "profiles").iterdir())) == 1
