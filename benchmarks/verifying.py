"""What it costs to find a bundle whole: the first load, which reads every file, and later ones, which look at times.

    python benchmarks/verifying.py [--megabytes N]

The bundle is the embedded one with so many megabytes of weights besides, named in its manifest; the cache is an empty
folder.  Seconds of processor time and of the clock for a GB, and milliseconds of a later load.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from machine import describe_machine

from dynamo_runtime.bundle import DEFAULT_BUNDLE, list_files, load_bundle

LATER = 20


def main() -> None:
    """Run the benchmark and print a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="of weights (default: 1000)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["DYNAMO_CACHE"] = str(Path(temporary) / "cache")
        folder = Path(temporary) / "bundle"
        shutil.copytree(DEFAULT_BUNDLE, folder)
        block = np.random.default_rng(0).bytes(1_000_000)
        with (folder / "model.onnx.data").open("wb") as file:
            for _ in range(arguments.megabytes):
                file.write(block)
        bundle = load_bundle(DEFAULT_BUNDLE)
        replace(bundle, folder=folder, files=list_files(folder)).write_manifest()
        wall, processor = time.perf_counter(), time.process_time()
        load_bundle(folder)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        later = []
        for _ in range(LATER):
            started = time.perf_counter()
            load_bundle(folder)
            later.append(1000 * (time.perf_counter() - started))
    of_a_gb = 1000 / arguments.megabytes
    print(
        f"first load: {processor * of_a_gb:.2f} s of a core and {wall * of_a_gb:.2f} s of the clock for a GB; later "
        f"loads: {statistics.median(later):.1f} ms. {describe_machine()}"
    )


if __name__ == "__main__":
    main()
