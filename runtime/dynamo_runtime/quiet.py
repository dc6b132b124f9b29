"""What other libraries would do unasked: send telemetry, and keep files in the home folder."""

import contextlib
import os

from .cache import cache_folder


def hush() -> None:
    """Have onnxruntime, huggingface_hub and matplotlib do none of that, before they are imported; a user may differ."""
    # Else onnxruntime writes below ~/.cache/Microsoft, and looks for a collector's host.
    for name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
    with contextlib.suppress(RuntimeError):  # there is no home folder
        os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))
