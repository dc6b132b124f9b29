"""The list of all that a profile has one of, from which tables, spreadsheets and comparisons are made."""

from __future__ import annotations

from ..device.profile import Profile
from ..tables import binary_size, number, percent
from .figures import Fact

DEVICE, CONDITIONS, BUNDLE = "Device", "Conditions", "Bundle"
CONSTANTS = "Load, memory, bandwidth, and what Python adds"


def _gpu(profile: Profile) -> str:
    device = profile.device
    driver = device.gpu_driver and f"driver {device.gpu_driver}"
    return ", ".join(filter(None, [device.gpu, binary_size(device.gpu_memory_bytes), driver]))


def _caches(profile: Profile) -> str:
    return ", ".join(f"{level} {binary_size(size)}" for level, size in profile.device.caches.items())


def _clock(profile: Profile) -> str:
    clock = " to ".join(number(value / 1e3) for value in dict.fromkeys(profile.conditions.frequency_mhz))
    return f"{clock} GHz" if clock else ""


def _busy(profile: Profile) -> str:
    busy = profile.conditions.busy
    return "not known" if busy is None else percent(busy)


def _temperature(profile: Profile) -> str:
    temperature = profile.conditions.temperature_c
    return "" if temperature is None else f"{temperature:.0f} °C"


def _widths(profile: Profile) -> str:
    """Return what the width test found, in a few words."""
    widths = profile.widths
    if widths is None:
        return ""
    if widths.exact:
        return f"the same bit for bit in passes over 1 to {widths.rows} tokens ({widths.compared:,} rows)"
    differ = f"differ by up to {widths.difference:.1e} (largest {widths.largest:.3g})"
    if widths.holds:
        return f"{differ}, which is rounding; no first choice of {widths.compared:,} changes"
    return f"{differ}, {widths.changed:,} first choices of {widths.compared:,} change"


def _widths_measured(profile: Profile) -> dict[str, float] | None:
    """Return the figures of the width test, by their names."""
    widths = profile.widths
    if widths is None:
        return None
    figures = {"difference": widths.difference, "largest": widths.largest}
    return figures | {"compared": widths.compared, "changed": widths.changed}


# In the order that spreadsheets have them in, which differs from the tables' where a place is given.
FACTS = (
    Fact(DEVICE, "CPU", lambda p: p.device.processor, row=("device", "processor", "", ""), compared=True),
    Fact(DEVICE, "cores", lambda p: p.device.cores, row=("device", "cores", "", ""), compared=True),
    Fact(
        DEVICE,
        "threads",
        lambda p: p.threads,
        lambda p: str(p.threads) if p.threads else "onnxruntime's choice",
        ("device", "threads", "", ""),
        compared=True,
    ),
    Fact(
        DEVICE,
        "instruction sets",
        lambda p: p.device.instruction_sets,
        lambda p: ", ".join(p.device.instruction_sets),
        ("device", "instruction set", "", ""),
    ),
    Fact(DEVICE, "caches", lambda p: p.device.caches, _caches, ("device", "cache", "", "bytes")),
    Fact(
        DEVICE,
        "memory",
        lambda p: p.device.memory_bytes or None,
        lambda p: binary_size(p.device.memory_bytes),
        ("device", "memory", "", "bytes"),
    ),
    Fact(DEVICE, "GPU", lambda p: p.device.gpu, row=("device", "gpu", "", ""), shown=False, compared=True),
    Fact(
        DEVICE,
        "GPU memory",
        lambda p: p.device.gpu_memory_bytes or None,
        row=("device", "gpu memory", "", "bytes"),
        shown=False,
    ),
    Fact(DEVICE, "GPU driver", lambda p: p.device.gpu_driver, row=("device", "gpu driver", "", ""), shown=False),
    Fact(DEVICE, "GPU", _gpu),
    Fact(DEVICE, "provider", lambda p: p.device.provider, row=("device", "provider", "", ""), compared=True),
    Fact(DEVICE, "onnxruntime", lambda p: p.device.onnxruntime, row=("device", "onnxruntime", "", ""), compared=True),
    Fact(DEVICE, "its providers", lambda p: ", ".join(p.device.providers)),
    Fact(DEVICE, "Python", lambda p: p.device.python, row=("device", "python", "", ""), compared=True),
    Fact(DEVICE, "system", lambda p: p.device.system, row=("device", "system", "", ""), compared=True),
    Fact(
        CONSTANTS,
        "bandwidth, GB/s",
        lambda p: p.bandwidth or None,
        row=("device", "bandwidth", "", "bytes/s"),
        measured=1e9,
        place=3,
    ),
    Fact(
        CONDITIONS,
        "measured, UTC",
        lambda p: p.created,
        lambda p: p.created[:16].replace("T", " "),
        ("conditions", "created", "", ""),
        compared=True,
    ),
    Fact(
        CONDITIONS,
        "repetitions",
        lambda p: int(p.quick),
        lambda p: "few (quick run)" if p.quick else "all",
        ("conditions", "quick", "", ""),
    ),
    Fact(
        CONDITIONS,
        "idle",
        lambda p: int(p.conditions.idle),
        lambda p: "yes" if p.conditions.idle else "NO",
        ("conditions", "idle", "", ""),
        compared=True,
    ),
    Fact(CONDITIONS, "quick run", lambda p: "yes" if p.quick else "no", shown=False, compared=True),
    Fact(
        CONDITIONS,
        "CPU used by others",
        lambda p: p.conditions.busy,
        _busy,
        ("conditions", "CPU used by others", "", "share"),
    ),
    Fact(
        CONDITIONS,
        "drift, slowest ÷ quickest",
        lambda p: p.conditions.drift,
        lambda p: f"{p.conditions.drift:.2f}",
        ("conditions", "drift", "", "ratio"),
    ),
    Fact(
        CONDITIONS,
        "clock",
        lambda p: dict(zip(("lowest", "highest"), p.conditions.frequency_mhz, strict=False)),
        _clock,
        ("conditions", "clock", "", "MHz"),
    ),
    Fact(
        CONDITIONS,
        "hottest",
        lambda p: p.conditions.temperature_c,
        _temperature,
        ("conditions", "temperature", "highest", "°C"),
    ),
    Fact(BUNDLE, "name", lambda p: p.bundle.name, row=("bundle", "name", "", "")),
    Fact(BUNDLE, "bundle", lambda p: p.bundle.name, shown=False, compared=True),
    Fact(
        BUNDLE,
        "SHA-256 of the graph",
        lambda p: p.bundle.graph_sha256,
        lambda p: p.bundle.graph_sha256[:16],
        ("bundle", "graph", "", "SHA-256"),
        place=5,
    ),
    Fact(BUNDLE, "kind", lambda p: p.bundle.kind, row=("bundle", "kind", "", ""), compared=True, place=2),
    Fact(
        BUNDLE, "precision", lambda p: p.bundle.precision, row=("bundle", "precision", "", ""), compared=True, place=4
    ),
    Fact(BUNDLE, "logits by width", _widths_measured, _widths, ("bundle", "logits by width", "", ""), place=6),
    Fact(BUNDLE, "architecture", lambda p: p.bundle.model_type, row=("bundle", "model type", "", ""), place=1),
    Fact(
        BUNDLE,
        "tokens a pass predicts",
        lambda p: p.bundle.n_tokens,
        row=("bundle", "tokens a pass", "", ""),
        compared=True,
        place=3,
    ),
    Fact(
        CONSTANTS,
        "graph and weights, MB",
        lambda p: p.bundle.graph_bytes,
        row=("bundle", "graph and weights", "", "bytes"),
        measured=1e6,
        place=1,
    ),
    Fact(CONSTANTS, "load, s", lambda p: p.load_s, row=("load", "load", "", "s"), measured=1.0),
    Fact(
        CONSTANTS,
        "peak memory, MB",
        lambda p: p.peak_bytes or None,
        row=("load", "memory", "peak", "bytes"),
        measured=1e6,
        place=2,
    ),
    Fact(
        CONSTANTS,
        "memory while decoding, MB",
        lambda p: p.steady_bytes or None,
        row=("load", "memory", "decoding", "bytes"),
        measured=1e6,
        place=2,
    ),
    Fact(
        CONSTANTS,
        "outside the pass, ms a plain token",
        lambda p: p.overhead or None,
        row=("load", "outside the pass", "plain token", "ms"),
        measured=1.0,
        place=4,
    ),
    Fact(
        CONSTANTS,
        "outside the pass, ms a draft",
        lambda p: p.drafting or None,
        row=("load", "outside the pass", "draft", "ms"),
        measured=1.0,
        place=4,
    ),
)
