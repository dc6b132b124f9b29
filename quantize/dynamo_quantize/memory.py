"""Peak memory of loading a bundle, reading a prompt and decoding, in a process of its own.

python -m dynamo_quantize.memory BUNDLE
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dynamo_runtime import Engine
from dynamo_runtime.providers import import_onnxruntime

PROMPT_TOKENS, NEW_TOKENS = 256, 32


def peak_memory(bundle: Path) -> int | None:
    """Return bytes that a process needs beyond Python and its libraries, or None where the system does not tell.

    Args:
        bundle: Folder of the bundle.
    """
    done = subprocess.run([sys.executable, "-m", __name__, str(bundle)], capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else None


def peak_bytes() -> int:
    """Return the largest memory this process has had, in bytes.

    Raises:
        ImportError: The system does not tell (Windows).
    """
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux the other way would count what the parent had when it forked
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Load the bundle named on the command line, decode, and print the bytes that took."""
    import_onnxruntime()
    before = peak_bytes()
    engine = Engine(sys.argv[1], provider="cpu")
    length = max(1, min(PROMPT_TOKENS, engine.session.max_length - NEW_TOKENS))
    prompt = [1 + i % (engine.bundle.vocab_size - 1) for i in range(length)]
    engine.generate(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    print(peak_bytes() - before)


if __name__ == "__main__":
    main()
