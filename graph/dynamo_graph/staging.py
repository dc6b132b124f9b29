"""Where a bundle goes: what may be replaced, and how a finished folder gets there."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import TracebackType

from dynamo_runtime.errors import OutputError
from dynamo_runtime.files import WholeFolder
from dynamo_runtime.manifest import MANIFEST

from .errors import WriteError
from .files import read_json

log = logging.getLogger("dynamo_graph")


class Destination:
    """The folder that becomes a bundle, as a whole; `with` keeps other writers out while the bundle is made.

    A folder holds at most one bundle, because a bundle *is* a folder, and nothing else: it is replaced as a whole, and
    only with `overwrite`, and only where all that lies in it is what an earlier export wrote according to its manifest.
    """

    def __init__(self, graph: Path, overwrite: bool) -> None:
        """Check the names.

        Args:
            graph: The `.onnx` file asked for.
            overwrite: Whether an earlier export of the same name may be replaced.

        Raises:
            WriteError: The name is not that of an ONNX file, or the folder is none or cannot be replaced as a whole.
        """
        if graph.suffix != ".onnx":
            raise WriteError(f"the output must be an .onnx file in the bundle's folder, not {graph}")
        self.graph = graph.name
        try:
            self.folder = graph.expanduser().absolute().parent.resolve()
        except (OSError, RuntimeError) as error:
            raise WriteError(f"{graph.parent} is not a folder: {error}") from error
        self.overwrite = overwrite
        self._place = WholeFolder(self.folder)
        existing = self.folder
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise WriteError(f"{existing} is a file, not a folder")
        if os.path.ismount(self.folder):
            raise WriteError(
                f"{self.folder} is where a file system is mounted, and cannot be replaced as a whole: "
                f"choose a folder in it, as {self.folder / 'bundle' / self.graph}"
            )
        beside = existing.parent if existing == self.folder else existing
        if not os.access(beside, os.W_OK | os.X_OK):
            raise WriteError(f"cannot write to {beside}, where the bundle is made before it moves to {self.folder}")

    def __enter__(self) -> Destination:
        """Keep other writers out, and check what can be checked before the work begins.

        Raises:
            WriteError: There is another writer, or something is in the way.
        """
        try:
            self._place.__enter__()
        except OutputError as error:
            raise WriteError(str(error)) from error
        try:
            self.check()
        except BaseException as error:
            self._place.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what was staged; an interrupt goes on with what is on disk by now as its message."""
        self._place.__exit__(kind, error, trace)

    def check(self) -> None:
        """Refuse to replace what an earlier export of the same graph did not write.

        Raises:
            WriteError: Something is in the way.
        """
        present = sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []
        if not present:
            return
        manifest = read_json(self.folder / MANIFEST)
        listed = manifest.get("files")
        if not manifest.get("format_version") or not isinstance(listed, dict):
            raise WriteError(self._foreign(present[0]))
        graph = str(manifest.get("graph", "model.onnx"))
        if graph != self.graph:
            raise WriteError(f"{self.folder} already holds the bundle {graph}; a folder holds one: choose another")
        foreign = [name for name in present if name != MANIFEST and name not in listed]
        if foreign:
            raise WriteError(self._foreign(foreign[0]))
        if not self.overwrite:
            raise WriteError(f"{self.folder / graph} already exists: pass --overwrite to replace that export")

    def _foreign(self, name: str) -> str:
        return (
            f"{self.folder / name} was not written by an earlier export, and a bundle takes its whole folder: "
            "choose another folder"
        )

    def stage(self) -> Path:
        """Return a new, empty folder on the same file system.

        Raises:
            WriteError: It cannot be made.
        """
        try:
            return self._place.new()
        except OutputError as error:
            raise WriteError(str(error)) from error

    def move_in(self, staged: Path) -> None:
        """Put a finished bundle into place, in one step: there is the earlier one or the new one, whole.

        Raises:
            WriteError: Something is in the way by now, or the folder cannot be replaced; it says what is there.
        """
        self.check()
        here = _stands_in(self.folder)
        try:
            self._place.put(staged)
        except OutputError as error:
            raise WriteError(str(error)) from error
        if here:
            os.chdir(self.folder)
            log.warning("the current folder was replaced: `cd .` shows the new one")


def _stands_in(folder: Path) -> bool:
    try:
        return Path.cwd() == folder
    except FileNotFoundError:
        return False
