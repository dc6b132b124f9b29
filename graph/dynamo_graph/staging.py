"""Where a bundle goes: what may be replaced, and how finished files get there."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from dynamo_runtime.manifest import MANIFEST, REPORT

from .errors import WriteError
from .files import read_json

TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "genai_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    REPORT,
)
REPLACED = ".dynamo_config.replaced.json"  # the earlier manifest while its files are being replaced


class Target:
    """The folder a bundle will lie in, which may already hold other things.

    A folder holds at most one bundle, because a bundle *is* a folder. Files are replaced only with `overwrite`, and
    only those that an earlier export wrote according to its manifest.
    """

    def __init__(self, graph: Path, overwrite: bool) -> None:
        """Checks what can be checked before the work begins.

        Args:
            graph: The `.onnx` file asked for.
            overwrite: Whether an earlier export of the same name may be replaced.

        Raises:
            WriteError: The name is not that of an ONNX file, or the folder is none or cannot be written to.
        """
        if graph.suffix != ".onnx":
            raise WriteError(f"the output must be an .onnx file in the bundle's folder, not {graph}")
        self.graph = graph.name
        self.folder = graph.expanduser().absolute().parent
        self.overwrite = overwrite
        existing = self.folder
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise WriteError(f"{existing} is a file, not a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise WriteError(f"cannot write to {existing}")
        self.nearest = existing
        self.check([self.graph, f"{self.graph}.data", "cooccurrence.npz", MANIFEST, *TEXT_FILES])

    def earlier(self) -> tuple[str | None, set[str]]:
        """Graph and files of the bundle that lies in the folder, going by its manifest."""
        graph, files = None, set()
        for name in (MANIFEST, REPLACED):
            manifest = read_json(self.folder / name)
            listed = manifest.get("files")
            if manifest.get("format_version") and isinstance(listed, dict):
                graph = str(manifest.get("graph", "model.onnx"))
                files |= {file for file in listed if Path(file).name == file} | {name}
        return graph, files

    def check(self, names: list[str]) -> None:
        """Refuses to touch what an earlier export of the same graph did not write.

        Args:
            names: Files that will be written, or that would be taken for part of the bundle.

        Raises:
            WriteError: One of them is in the way.
        """
        present = [name for name in names if (self.folder / name).exists()]
        if not present:
            return
        graph, own = self.earlier()
        if graph is not None and graph != self.graph:
            raise WriteError(f"{self.folder} already holds the bundle {graph}; a folder holds one: choose another")
        if not self.overwrite:
            raise WriteError(
                f"{self.folder / present[0]} already exists"
                + (": pass --overwrite to replace that export" if graph is not None else ": choose another folder")
            )
        foreign = [name for name in present if name not in own]
        if foreign:
            raise WriteError(f"{self.folder / foreign[0]} was not written by an earlier export: choose another folder")

    def stage(self) -> Path:
        """A new, empty folder on the same file system.

        Raises:
            WriteError: It cannot be made.
        """
        try:
            return Path(tempfile.mkdtemp(prefix=".dynamo-export-", dir=self.nearest))
        except OSError as error:
            raise WriteError(f"cannot write to {self.nearest}: {error.strerror}") from error

    def move_in(self, staged: Path) -> None:
        """Moves a finished bundle into place, the manifest last.

        Raises:
            WriteError: Something is in the way by now, or a file cannot be moved; what was moved is taken back.
        """
        names = sorted(path.name for path in staged.iterdir())
        self.check(names)
        umask = os.umask(0)
        os.umask(umask)
        try:
            if not self.folder.exists():
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                staged.chmod(0o777 & ~umask)
                os.rename(staged, self.folder)
                return
            self._move_files(staged, names)
        except OSError as error:
            raise WriteError(f"cannot move the bundle to {self.folder}: {error.strerror}") from error

    def _move_files(self, staged: Path, names: list[str]) -> None:
        _, own = self.earlier()
        if (self.folder / MANIFEST).exists():  # from here on there is no valid bundle until the new manifest is in
            os.replace(self.folder / MANIFEST, self.folder / REPLACED)
        moved: list[str] = []
        try:
            for name in [*(n for n in names if n != MANIFEST), MANIFEST]:
                os.replace(staged / name, self.folder / name)
                moved.append(name)
        except BaseException:
            for name in set(moved) - own:  # what replaced an earlier file stays, as part of a bundle without manifest
                (self.folder / name).unlink(missing_ok=True)
            raise
        for name in (own - set(names)) | {REPLACED}:
            (self.folder / name).unlink(missing_ok=True)


def discard(staged: Path) -> None:
    """Removes a staging folder, if it is still there."""
    shutil.rmtree(staged, ignore_errors=True)
