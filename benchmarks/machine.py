"""Names the machine a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_INTERESTING_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "BF16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
}


def describe_machine() -> str:
    """Processor, instruction sets, cores that this process may use, and operating system."""
    name, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        pairs = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        name = fields.get("model name", name)
        if "cpu family" in fields:
            name += f" (family {fields['cpu family']}, model {fields.get('model')})"
        present = (fields.get("flags") or fields.get("Features") or "").split()
        flags = ", ".join(label for flag, label in _INTERESTING_FLAGS.items() if flag in present)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join(part for part in (f"{cores} cores of {name}", flags, platform.system()) if part)
