"""What else the machine did meanwhile, and how much memory this process takes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..device.inspection import cores, optional
from ..device.records import Conditions

_BUSY, _DRIFT = 0.1, 0.1  # more of either, and the machine was not idle


def memory(field: str) -> int:
    """Return bytes of this process's memory: "VmHWM" its peak, "VmRSS" now; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        psutil = optional("psutil")
        if psutil is None:
            return 0
        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss) if field == "VmHWM" else info.rss)


class Watch:
    """Samples clock, temperature and other processes, from `start` to `stop`."""

    def __init__(self) -> None:
        self._psutil = optional("psutil")
        self._frequencies: list[float] = []
        self._temperatures: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._started, self._all, self._own = time.perf_counter(), self._busy(), time.process_time()
        if self._psutil:
            self._thread.start()

    def stop(self) -> None:
        """End."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        elapsed = (time.perf_counter() - self._started) * cores()
        others = None if self._all is None else self._busy() - self._all - (time.process_time() - self._own)
        self._others = None if others is None else max(others, 0.0) / elapsed

    def conditions(self, drift: float) -> Conditions:
        """Return what was seen; `drift` is the largest over the smallest cost of one and the same pass."""
        idle = (self._others is None or self._others < _BUSY) and drift < 1 + _DRIFT
        ends = [min(self._frequencies), max(self._frequencies)] if self._frequencies else []
        return Conditions(idle, self._others, drift, ends, max(self._temperatures, default=None))

    def _busy(self) -> Any:
        """Return seconds that our cores have been busy since they were started, or None."""
        if self._psutil is None:
            return None
        ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        times = self._psutil.cpu_times(percpu=True)
        chosen = [each for i, each in enumerate(times) if i in ours or len(times) < len(ours)]
        return sum(sum(each) - each.idle - getattr(each, "iowait", 0.0) for each in chosen)

    def _sample(self) -> None:
        while not self._done.wait(0.5):
            if frequency := self._psutil.cpu_freq():
                self._frequencies.append(frequency.current)
            sensors: dict[str, Any] = getattr(self._psutil, "sensors_temperatures", dict)()
            self._temperatures += [sensor.current for group in sensors.values() for sensor in group if sensor.current]


@contextmanager
def watched() -> Iterator[Watch]:
    """Watch clock, temperature and other processes meanwhile."""
    watch = Watch()
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
