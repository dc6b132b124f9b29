"""What machine this is: read from the operating system, with psutil and nvidia-smi where they are there."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from ..providers import cores, import_onnxruntime
from .records import Device

_INTERESTING_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512_bf16": "BF16",
    "amx_int8": "AMX",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "sve": "SVE",
}
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def optional(module: str) -> Any:
    """Return a module of the extra [profile], or None."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


@cache
def processor() -> tuple[str, tuple[str, ...]]:
    """Return the name of the CPU and its instruction sets of interest."""
    name, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        pairs = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        name = fields.get("model name") or fields.get("Model") or fields.get("Hardware") or name
        if "cpu family" in fields:
            name += f" (family {fields['cpu family']}, model {fields.get('model')})"
        flags = fields.get("flags") or fields.get("Features") or ""
    elif platform.system() == "Darwin":
        name = _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or name
    present = set(flags.split())
    return name, tuple(label for flag, label in _INTERESTING_FLAGS.items() if flag in present)


def describe_processor() -> str:
    """Cores, processor, instruction sets and operating system in one line."""
    name, sets = processor()
    return ", ".join(part for part in (f"{cores()} cores of {name}", ", ".join(sets), platform.system()) if part)


def device_key(provider: str) -> str:
    """Tell devices apart, in a file name: what runs the graph, and onnxruntime's version."""
    what = _nvidia()[0] if provider == "cuda" else f"{processor()[0]}-{cores()}"
    text = f"{what}-{provider}-ort{import_onnxruntime().__version__}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-").lower()


def inspect_device(provider: str) -> Device:
    """Return all that can be told of the device.

    Args:
        provider: Execution provider that runs the graph.
    """
    ort = import_onnxruntime()
    name, sets = processor()
    gpu, memory, driver = _nvidia() if provider in ("cuda", "tensorrt") else ("", 0, "")
    return Device(
        processor=name,
        cores=cores(),
        provider=provider,
        onnxruntime=ort.__version__,
        instruction_sets=list(sets),
        caches=_cache_sizes(),
        memory_bytes=_memory_bytes(),
        gpu=gpu,
        gpu_memory_bytes=memory,
        gpu_driver=driver,
        system=f"{platform.system()} {'.'.join(re.findall('[0-9]+', platform.release())[:2])}".strip(),
        python=platform.python_version(),
        providers=[full.removesuffix("ExecutionProvider").lower() for full in ort.get_available_providers()],
    )


def _cache_sizes() -> dict[str, int]:
    sizes = {}
    for folder in sorted(_CACHES.glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction":
                sizes[f"L{level}" + ("d" if kind == "Data" else "")] = int(size.rstrip("K")) << 10
        except (OSError, ValueError):
            continue
    return sizes


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        psutil = optional("psutil")
        return int(psutil.virtual_memory().total) if psutil else 0


@cache
def _nvidia() -> tuple[str, int, str]:
    """Name, memory in bytes and driver of the first NVIDIA GPU; empty where there is none."""
    line = _output(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"])
    fields = [field.strip() for field in line.partition("\n")[0].split(",")]
    if len(fields) != 3 or not fields[1].isdigit():
        return "", 0, ""
    return fields[0], int(fields[1]) << 20, fields[2]


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
