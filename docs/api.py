"""Writes a page of every module's docstrings, for `python3 dev.py docs`.

    python docs/api.py FOLDER

Names that a package loads when they are first asked for are asked for here, or pdoc would not find them.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pdoc

from dynamo_runtime.quiet import hush

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("runtime", "model", "train", "export", "quantize", "graph", "evaluate")


def documented(folder: Path, name: str) -> Iterator[str]:
    """Yield a package and what is below it, but for what pdoc finds by itself.

    By itself it finds modules of a package without `__all__`.
    """
    yield name
    package = importlib.import_module(name)
    exported = getattr(package, "__all__", None)
    for exported_name in exported or ():
        setattr(package, exported_name, getattr(package, exported_name))
    for path in sorted(folder.iterdir()):
        inner = f"{name}.{path.stem}"
        if (path / "__init__.py").is_file():
            below = documented(path, inner)
            if exported is None:
                next(below)  # found from here
            yield from below
        elif exported is not None and path.suffix == ".py" and path.stem not in ("__init__", "__main__"):
            yield inner


def main() -> None:
    """Write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    hush()
    names = [n for package in PACKAGES for n in documented(ROOT / package / f"dynamo_{package}", f"dynamo_{package}")]
    warnings.filterwarnings("ignore", module="pdoc")  # annotations of dataclasses, which it then shows as they stand
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*names, output_directory=folder)


if __name__ == "__main__":
    main()
