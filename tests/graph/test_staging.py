"""A folder becomes a bundle as a whole: whatever fails and whenever, it holds the earlier one or the new one."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support import handmade

from dynamo_graph.errors import WriteError
from dynamo_graph.staging import Destination
from dynamo_runtime import files
from dynamo_runtime.bundle import load_bundle

posix = pytest.mark.skipif(os.name == "nt", reason="forks, and kills what it forked")

CALLS = [
    (os, name)
    for name in ("rename", "replace", "mkdir", "rmdir", "unlink", "open", "fsync", "lstat", "chmod", "scandir")
] + [(shutil, "rmtree"), (files, "_exchange"), (files, "_locked")]
"""Through which all goes that a writer does to the disk (`pathlib` calls those of `os`)."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two bundles that differ in more than one file; the second has one file less."""
    folder = tmp_path_factory.mktemp("bundles")
    for seed, name in enumerate(("old", "new")):
        report = {"report.json": f'{{"parity": "{name}"}}'}
        handmade.write_bundle(folder / name, 2, seed=seed, counts=name == "old", files=report)
    return {name: folder / name for name in ("old", "new")}


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is waited for until it is on the disk; the tests do not wait, as none of them cuts the power."""
    found: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: found.append(os.fstat(handle).st_ino))
    return found


@pytest.fixture(params=["exchanged", "renamed twice"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a folder: what Linux has, and what is done elsewhere."""
    if request.param == "renamed twice":
        monkeypatch.setattr(files, "_exchange", lambda new, folder: False)
    return request.param


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def replace(folder: Path, bundle: Path, graph: str = "model.onnx") -> None:
    """What an export does, without the work."""
    with Destination(folder / graph, overwrite=True) as destination:
        staged = destination.stage()
        for path in bundle.iterdir():
            shutil.copyfile(path, staged / path.name)
        destination.move_in(staged)


def which(folder: Path, bundles: dict[str, Path]) -> str:
    """The one bundle that a folder holds, whole."""
    load_bundle(folder, verify=True)
    (name,) = (name for name, bundle in bundles.items() if contents(bundle) == contents(folder))
    return name


class Injected:
    """Does something at one of the calls that go to the disk, before it or after it."""

    def __init__(self, at: int, after: bool, fault: Callable[[], None]) -> None:
        self.at, self.after, self.fault, self.calls = at, after, fault, 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for module, name in CALLS:
                patch.setattr(module, name, self._wrapped(getattr(module, name)))
            yield

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **settings: Any) -> Any:
            self.calls += 1
            hit = self.calls - 1 == self.at
            if hit and not self.after:
                self.fault()
            try:
                return call(*arguments, **settings)
            finally:  # a call that fails of its own is a point in time as well
                if hit and self.after:
                    self.fault()

        return wrapper


def _full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _interrupt() -> None:
    raise KeyboardInterrupt


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def points() -> Iterator[tuple[int, bool]]:
    """Every call, before it and after it, until there are no more."""
    for at in range(400):
        for after in (False, True):
            yield at, after


@pytest.mark.parametrize("fault", [_full, _interrupt])
def test_a_fault_at_any_call_leaves_one_bundle_and_says_which(
    fault: Callable[[], None], way: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "at" / "bundle"
    seen = set()
    for at, after in points():
        shutil.rmtree(tmp_path / "at", ignore_errors=True)
        shutil.copytree(bundles["old"], folder)
        injected, said = Injected(at, after, fault), ""
        try:
            with injected():
                replace(folder, bundles["new"])
        except (WriteError, OSError, KeyboardInterrupt) as error:
            said = str(error)
        if injected.calls <= at:
            break
        if way == "renamed twice" and not folder.exists():
            assert said == "" or "the next run or load puts it back" in said, (at, after)
        found = which(folder, bundles)
        assert ("in place" not in said) or found == "new", (at, after, said)
        assert ("nothing was written" not in said) or found == "old", (at, after, said)
        if not said and fault is _full:  # what may fail without harm
            assert found == "new", (at, after)
        seen.add(found)
        replace(folder, bundles["new"])
        assert which(folder, bundles) == "new"
        assert [path.name for path in folder.parent.iterdir()] == ["bundle"], (at, after)
    assert at > 40 and seen == {"old", "new"}


@pytest.mark.slow
@posix
@pytest.mark.parametrize("earlier", [True, False])
def test_killed_at_any_call_there_is_one_bundle(
    earlier: bool, way: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    """The next load finds it, and the next writer leaves nothing of the dead one behind."""
    folder = tmp_path / "at" / "bundle"
    seen = set()
    for at, after in points():
        shutil.rmtree(tmp_path / "at", ignore_errors=True)
        if earlier:
            shutil.copytree(bundles["old"], folder)
        if not _forked(lambda at=at, after=after: _replace_and_die(folder, bundles["new"], at, after)):
            break
        if earlier or folder.exists():
            seen.add(which(folder, bundles))
        # A writer of another folder there clears away as well, but puts back what is to be put back.
        replace(folder.parent / "other", bundles["old"])
        assert {path.name for path in folder.parent.iterdir()} - {"bundle"} == {"other"}, (at, after)
        replace(folder, bundles["new"])
        assert which(folder, bundles) == "new"
    assert at > 40 and seen == ({"old", "new"} if earlier else {"new"})


def _replace_and_die(folder: Path, bundle: Path, at: int, after: bool) -> None:
    with Injected(at, after, _kill)():
        replace(folder, bundle)


def _forked(work: Callable[[], None]) -> bool:
    """Runs it in a process of its own; whether that was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        with suppress(BaseException):
            work()
            status = 0
        os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _at_once(replacing: dict[Path, list[Path]]) -> list[tuple[Path, int]]:
    """Replaces folders by bundles, each in a process of its own; which ended how: 0 is done, 3 refused."""
    children = []
    for folder, bundle in [(folder, each) for folder, some in replacing.items() for each in some]:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                replace(folder, bundle)
                status = 0
            except WriteError as error:
                status = 3 if "another process is writing" in str(error) else 1
            finally:
                os._exit(status)
        children.append((bundle, child))
    return [(bundle, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for bundle, child in children]


@posix
def test_two_writers_at_once_never_mix(way: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    """Either one is told at once that there is another, or it comes after it."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundles["old"], folder)
    for _ in range(int(os.environ.get("DYNAMO_TEST_ROUNDS", "20"))):
        ended = dict(_at_once({folder: list(bundles.values())}))
        assert set(ended.values()) <= {0, 3} and 0 in ended.values()
        assert ended[bundles[which(folder, bundles)]] == 0
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@posix
def test_writers_of_other_folders_do_not_disturb(way: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    """Although each looks for what dead ones left behind in that place."""
    for _ in range(10):
        ended = _at_once({tmp_path / str(i): [bundles["new"]] for i in range(4)})
        assert [status for _, status in ended] == [0, 0, 0, 0]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]


def test_a_second_writer_fails_at_once(bundles: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "below" / "bundle"
    with Destination(folder / "model.onnx", overwrite=False):
        with pytest.raises(WriteError, match=r"another process is writing .*: wait for it, or name another folder"):
            replace(folder, bundles["new"])
        replace(tmp_path / "below" / "other", bundles["new"])  # which does not touch the other's work
        assert {path.name for path in folder.parent.iterdir()} == {"other", f".bundle{files.WORK}"}
    replace(folder, bundles["new"])
    assert {path.name for path in folder.parent.iterdir()} == {"other", "bundle"}


def test_nothing_is_left_where_nothing_was_written(tmp_path: Path) -> None:
    """Folders made on the way neither."""
    with (
        pytest.raises(ZeroDivisionError),
        Destination(tmp_path / "a" / "b" / "model.onnx", overwrite=False) as destination,
    ):
        (destination.stage() / "model.onnx").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_between_two_renames_is_put_back(bundles: dict[str, Path], tmp_path: Path) -> None:
    """By a load, of the folder or of its graph, and by a writer, even if somebody made the folder anew."""
    folder = tmp_path / "bundle"
    left = tmp_path / f".bundle{files.WORK}" / files.OLD
    for load in (folder, folder / "model.onnx"):
        shutil.copytree(bundles["old"], left)
        assert load_bundle(load, verify=True).folder == folder
        assert which(folder, bundles) == "old" and not left.exists()
        shutil.rmtree(folder)
    shutil.copytree(bundles["old"], left)
    folder.mkdir()
    with pytest.raises(WriteError, match="already exists: pass --overwrite"), Destination(folder / "model.onnx", False):
        pass
    assert which(folder, bundles) == "old" and [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_bundle_by_name_is_put_back(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMO_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundles["old"], tmp_path / "bundles" / "some" / f".int8{files.WORK}" / files.OLD)
    assert load_bundle("some", verify=True).folder == tmp_path / "bundles" / "some" / "int8"


def test_a_link_stays_and_what_it_names_is_replaced(way: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(bundles["old"], tmp_path / "elsewhere" / "bundle")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere" / "bundle")
    replace(link, bundles["new"])
    assert link.is_symlink() and which(link, bundles) == "new"
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["bundle"]


def test_a_link_in_place_of_the_work_folder_is_not_followed(bundles: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    for name in ("bundle", "other"):
        (tmp_path / f".{name}{files.WORK}").symlink_to(tmp_path / "precious")
    with pytest.raises(WriteError, match="is a symbolic link"):
        replace(tmp_path / "bundle", bundles["new"])
    assert contents(tmp_path / "precious") == {"file": b"mine"}


def test_a_mount_point_is_refused(bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
    (tmp_path / "volume").mkdir()
    with pytest.raises(WriteError, match="cannot be replaced as a whole: choose a folder in it"):
        replace(tmp_path / "volume", bundles["new"])
    replace(tmp_path / "volume" / "bundle", bundles["new"])


@posix
def test_the_current_folder_may_be_the_bundle(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    replace(Path(), bundles["new"])
    assert "`cd .` shows the new one" in caplog.text
    assert Path("model.onnx").is_file() and which(Path(), bundles) == "new"


def test_all_is_on_the_disk_before_it_is_in_place(
    synced: list[int], bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundles["old"], tmp_path / "bundle")
    exchange, before = files._exchange, []
    monkeypatch.setattr(files, "_exchange", lambda *folders: (before.extend(synced), exchange(*folders))[1])
    replace(tmp_path / "bundle", bundles["new"])
    everything = [tmp_path / "bundle", *(tmp_path / "bundle").iterdir()]
    assert {path.stat().st_ino for path in everything} <= set(before)
    assert synced[-1] == tmp_path.stat().st_ino


def test_permissions_are_those_of_the_earlier_folder(bundles: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    replace(folder, bundles["old"])
    assert folder.stat().st_mode & 0o777 == 0o777 & ~files._umask()
    folder.chmod(0o750)
    replace(folder, bundles["new"])
    assert folder.stat().st_mode & 0o777 == 0o750


@posix
@pytest.mark.parametrize(("staged", "said"), [(False, "nothing was written"), (True, "the new files are in place")])
def test_an_interrupted_command_says_what_is_there(
    staged: bool, said: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    """The line that the commands print comes from what is on disk."""
    code = f"""
from pathlib import Path
from dynamo_graph.staging import Destination
from dynamo_quantize.cli import guarded
def work():
    with Destination(Path({str(tmp_path / "bundle" / "model.onnx")!r}), False) as destination:
        if {staged}:
            destination.move_in(destination.stage())
        raise KeyboardInterrupt
raise SystemExit(guarded(work, "dynamo-export"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stderr.startswith(f"dynamo-export: interrupted, {said}")
