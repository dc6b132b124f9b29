"""Files of results, which are written whole or not at all, and small files of JSON, which may come from anywhere."""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from .errors import BundleError, OutputError

# What a bundle knows of text besides its tokenizer, as Hugging Face names it.
TEMPLATE, CONFIG, SPECIAL_TOKENS = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"

WORK = ".dynamo-writing"  # ends the name of the hidden folder beside a result in which the result is made
LOCK, OLD, SWAPPED = "lock", "old", "swapped"  # what may lie in it besides new folders
_CHUNK_BYTES = 1 << 20
WAIT_SECONDS = 2.0  # for a process that is between two renames


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there only once it is whole.

    Raises:
        OutputError: It cannot be written there.
    """
    check_writable(path)
    try:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def check_writable(path: Path) -> None:
    """Find out before the work begins whether a file can be written.

    Raises:
        OutputError: It cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def read_small(path: Path, most_bytes: int) -> str:
    """Return the text of a file that has no reason to be big.

    Raises:
        OSError: It cannot be read.
        ValueError: It is bigger, or not UTF-8.
    """
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes} bytes, which such a file never has")
    return content.decode("utf-8")


def read_object(path: Path, most_bytes: int) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds none.
    """
    try:
        content = json.loads(read_small(path, most_bytes))
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read in chunks."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    return digest.hexdigest()


def file_name(text: str) -> str:
    """Return a text as part of a file's name, wherever it comes from: it names no other folder."""
    return re.sub(r"[^A-Za-z0-9._-]|^\.", "_", text)[:100]


def lies_in(folder: Path, name: str) -> bool:
    """Tell whether a name, wherever it comes from, is that of a file in a folder itself, and of no link out of it."""
    path = folder / name
    return Path(name).name == name and os.path.isfile(path) and path.resolve().parent == folder.resolve()


class WholeFolder:
    """A folder that is replaced whole or not at all, and by one process at a time; used with `with`.

    What is new is made in a hidden folder beside it, which holds a lock as well: the system lets go of it when the
    process dies, so whoever gets the lock knows that all else in there was left behind.

    Attributes:
        folder: The folder, with symbolic links followed; the links stay.
    """

    def __init__(self, folder: Path) -> None:
        """Touches nothing yet."""
        self.folder = folder.resolve()
        self._work = _work_of(self.folder)
        self._made: list[Path] = []
        self._lock: IO[bytes] | None = None
        self._new: tuple[int, int] | None = None

    def __enter__(self) -> "WholeFolder":
        """Take the lock, and clear away what processes left behind that are dead.

        Raises:
            OutputError: Another process writes this folder, or it cannot be written at all.
        """
        try:
            if not self._enter():
                raise OutputError(f"another process is writing {self.folder}: wait for it, or name another folder")
        except OSError as error:
            self._leave()
            raise OutputError(f"cannot write to {self.folder.parent}: {error.strerror or error}") from error
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what is no longer needed and let go of the lock; Ctrl-C goes on with what is on disk by now."""
        try:
            self._leave()
        except KeyboardInterrupt as interrupt:
            error = interrupt
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(self.state()) from error

    def _enter(self) -> bool:
        parent = self.folder.parent
        self._made = [each for each in (parent, *parent.parents) if not _there(each)]
        parent.mkdir(parents=True, exist_ok=True)
        for work in sorted(parent.glob(f".*{WORK}")):
            if work != self._work:
                _settle_dead(work)
        for _ in range(10):
            self._lock = _take_lock(self._work)
            if self._lock is not None:
                break
            time.sleep(0.05)  # one that only clears away or puts back is done by then
        else:
            return False
        _settle(self._work)
        return True

    def _leave(self) -> None:
        try:
            if self._lock is not None:
                with suppress(OSError):  # what is left the next process clears away
                    _settle(self._work)
        finally:
            if self._lock is not None:
                _let_go(self._lock, self._work)
            for folder in self._made:
                with suppress(OSError):  # it holds something by now
                    folder.rmdir()

    def new(self) -> Path:
        """Return an empty folder on the same file system; it is gone at the end unless it was put in place.

        Raises:
            OutputError: It cannot be made.
        """
        try:
            path = Path(tempfile.mkdtemp(prefix="new-", dir=self._work))
            # As any new folder, or as the one in whose place it comes.
            path.chmod(self.folder.stat().st_mode & 0o7777 | 0o700 if _there(self.folder) else 0o777 & ~_umask())
            return path
        except OSError as error:
            raise OutputError(f"cannot write to {self.folder.parent}: {error.strerror or error}") from error

    def put(self, new: Path) -> None:
        """Put a finished folder in place; at any moment there is the old one or the new one, whole.

        Args:
            new: From `new`.

        Raises:
            OutputError: It did not work; the message says what is there.
        """
        try:
            self._new = _identity(new)
            for path in (*new.rglob("*"), new, new.parent):
                _sync(path)
            if not _there(self.folder):
                os.rename(new, self.folder)
            elif not _exchange(new, self.folder):
                _rename_twice(new, self.folder)
            _sync(self.folder.parent)
        except OSError as error:
            with suppress(OSError):
                _put_back(self._work)
            raise OutputError(
                f"cannot put the new files into {self.folder}: {error.strerror or error}; {self.state()}"
            ) from error

    def state(self) -> str:
        """Return what is on disk, in words."""
        with suppress(OSError):
            if self._new is not None and _identity(self.folder) == self._new:
                return f"the new files are in place in {self.folder}"
        with suppress(OSError):
            if _there(self._work / OLD) and not _there(self.folder):
                return f"what was there lies in {self._work / OLD}, and the next run or load puts it back"
        return "nothing was written"


def recover(folder: Path) -> None:
    """Put a folder back that a process was replacing when it died; most systems never need it."""
    end = time.monotonic() + WAIT_SECONDS
    with suppress(OSError, ValueError, RuntimeError):  # of what is no path: whoever asked says so
        folder = folder.resolve()
        work = _work_of(folder)
        while not _there(folder) and _there(work / OLD):
            lock = _take_lock(work)
            if lock is not None:
                try:
                    _put_back(work)
                finally:
                    _let_go(lock, work)
            elif time.monotonic() > end:
                return
            else:
                time.sleep(0.01)


def recover_below(parent: Path) -> None:
    """`recover` for every folder in this one."""
    for work in parent.glob(f".*{WORK}"):
        recover(_folder_of(work))


def _work_of(folder: Path) -> Path:
    return folder.parent / f".{folder.name}{WORK}"


def _folder_of(work: Path) -> Path:
    return work.with_name(work.name.removeprefix(".").removesuffix(WORK))


def _there(path: Path) -> bool:
    """Tell whether there is such a thing; unlike `Path.exists`, an error is an error in every version of Python."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _identity(path: Path) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # which cannot be opened there
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have nothing to wait for
            raise
    finally:
        os.close(handle)


def _exchange(new: Path, folder: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    at_cwd, exchange = -100, 2
    if rename(at_cwd, os.fsencode(new), at_cwd, os.fsencode(folder), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number))


def _rename_twice(new: Path, folder: Path) -> None:
    """Exchange two folders where there is a moment between; `_put_back` knows what to do about one that died in it."""
    os.rename(folder, new.parent / OLD)
    os.rename(new, folder)
    os.rename(new.parent / OLD, new.parent / SWAPPED)  # so that what is called OLD is whole, always


def _put_back(work: Path) -> None:
    old, folder = work / OLD, _folder_of(work)
    if not _there(old):
        return
    if _there(folder):
        with suppress(OSError):  # a folder without anything in it is none
            folder.rmdir()
    if not _there(folder):
        os.rename(old, folder)


def _settle(work: Path) -> None:
    """Put back what is to be put back and remove all else but the lock, which the caller holds."""
    _put_back(work)
    if _there(work / OLD):
        shutil.rmtree(work / SWAPPED, ignore_errors=True)
        os.rename(work / OLD, work / SWAPPED)
    for left in list(work.iterdir()):
        if left.name != LOCK:
            shutil.rmtree(left, ignore_errors=True)


def _settle_dead(work: Path) -> None:
    """Do the same for a folder beside, if nobody holds its lock."""
    with suppress(OSError):  # not ours, perhaps
        lock = _take_lock(work)
        if lock is not None:
            try:
                _settle(work)
            finally:
                _let_go(lock, work)


def _take_lock(work: Path) -> IO[bytes] | None:
    """Return the lock of a folder, held until it is closed or the process dies; None if another holds it."""
    for _ in range(100):
        if work.is_symlink():  # which would have us remove what lies elsewhere
            raise OSError(errno.EEXIST, f"{work} is a symbolic link")
        work.mkdir(parents=True, exist_ok=True)  # whoever made the folder above may just have removed it
        try:
            lock = (work / LOCK).open("a+b")
            if not _locked(lock):
                lock.close()
                return None
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(work / LOCK)):
                return lock
            lock.close()
        except FileNotFoundError:
            pass  # another has just let go of it and removed it
    raise OSError(errno.EBUSY, f"cannot lock {work}")


def _locked(file: IO[bytes]) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _let_go(lock: IO[bytes], work: Path) -> None:
    if os.name == "nt":  # where an open file cannot be removed
        lock.close()
    try:
        with suppress(OSError):
            (work / LOCK).unlink()
    finally:
        lock.close()
    with suppress(OSError):  # something is left in it, or another process is in by now
        work.rmdir()
