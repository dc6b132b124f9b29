"""What every drafter on a base has in common: its shape, its tensors, and the file they are kept in."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .checkpoint import load_base, read_tensors
from .eight_bits import FORM, STORAGE, check_form, from_eight_bits, to_eight_bits
from .errors import CheckpointError
from .sources import Checkpoint, find_checkpoint


class DrafterModel(nn.Module):
    """A base language model and what was put on it to predict further tokens.

    A subclass is made of a base and the whole numbers in `sizes`, by keyword, and has an attribute for each.

    Attributes:
        kind: What bundles, reports and the command line call it.
        file: In which it is kept beside its base.
        command: The subcommand of `dynamo-train` that makes it.
        sizes: Names of the whole numbers that say its shape.
        on_stem: Whether it adds decoder layers that read the base's penultimate state.
        base: The base language model, whose own prediction verifies.
    """

    kind: ClassVar[str]
    file: ClassVar[str]
    command: ClassVar[str]
    sizes: ClassVar[tuple[str, ...]]
    on_stem: ClassVar[bool] = True
    base: PreTrainedModel

    @property
    def config(self) -> Any:
        """The base's configuration."""
        return self.base.config

    @property
    def shape(self) -> dict[str, int]:
        """The numbers named by `sizes`."""
        return {name: getattr(self, name) for name in self.sizes}

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """Tokens that one pass predicts, the base's own among them."""

    @abstractmethod
    def drafter_state_dict(self) -> dict[str, Tensor]:
        """Return what the drafter adds to its base, sharing memory with the model."""

    def head_parameters(self) -> int:
        """Return the number of parameters that the drafter adds to the base; ids that it keeps beside them are none."""
        return sum(tensor.numel() for tensor in self.drafter_state_dict().values() if tensor.is_floating_point())

    def save(self, folder: str | Path) -> None:
        """Write the base as an ordinary HF model, and the drafter's `file` beside it."""
        self.base.save_pretrained(folder)
        self.write(Path(folder), self.drafter_state_dict(), self.shape)

    @classmethod
    def load(cls, name: str | Path | Checkpoint, dtype: torch.dtype = torch.float32) -> Self:
        """Load base and drafter; no pickle is read, and no remote code run.

        Args:
            name: See `dynamo_model.sources.find_checkpoint`.
            dtype: The parameters' type after loading, whatever they are stored as.

        Raises:
            CheckpointError: Nothing there, no such drafter beside the base, or tensors that do not fit.
        """
        checkpoint = find_checkpoint(name)
        tensors, shape = cls.read(checkpoint)
        return cls.restore(load_base(checkpoint, dtype), tensors, shape)

    @classmethod
    def restore(cls, base: PreTrainedModel, tensors: Mapping[str, Tensor], shape: Mapping[str, int]) -> Self:
        """Put a drafter on a base that is loaded.

        Args:
            base: The base, used as it is.
            tensors: What the drafter adds to it, as `read` returns it; converted to the base's type.
            shape: Its shape, likewise.

        Raises:
            CheckpointError: They do not fit the base or each other.
        """
        model = cls._shaped(base, tensors, shape)
        own = model.drafter_state_dict()
        if own.keys() != tensors.keys() or any(own[k].shape != tensors[k].shape for k in own):
            raise CheckpointError(f"{cls.file} does not fit the base model's configuration")
        for key, tensor in own.items():
            tensor.data.copy_(tensors[key])
        return model.eval()

    @classmethod
    def _shaped(cls, base: PreTrainedModel, tensors: Mapping[str, Tensor], shape: Mapping[str, int]) -> Self:
        """Return a drafter of a shape, its tensors yet to be set.

        Kinds whose tensors say more of it than the shape have their own.
        """
        return cls(base, **{size: shape.get(size, 0) for size in cls.sizes})

    @classmethod
    def read(cls, name: str | Path | Checkpoint) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Read what a drafter adds to its base, without the base.

        Args:
            name: See `dynamo_model.sources.find_checkpoint`.

        Returns:
            Its tensors and its shape, as `write` takes them.

        Raises:
            CheckpointError: There is no such drafter, or its file is not what its name says.
        """
        checkpoint = find_checkpoint(name)
        path = checkpoint.file(cls.file)
        if path is None:
            raise CheckpointError(
                f"'{checkpoint.name}' has no {cls.file}: train it first with "
                f"`dynamo-train {cls.command} {checkpoint.name} --data TEXT --out FOLDER`"
            )
        tensors, metadata = read_tensors(path)
        if metadata.get("kind") != cls.kind:
            raise CheckpointError(f"{path} does not say that it holds a drafter of kind {cls.kind}")
        if STORAGE in metadata:
            check_form(metadata[STORAGE], path)
            tensors = from_eight_bits(tensors, path)
        return tensors, {key: int(value) for key, value in metadata.items() if value.isdigit()}

    @classmethod
    def write(
        cls, folder: Path, tensors: Mapping[str, Tensor], shape: Mapping[str, int], *, eight_bits: bool = False
    ) -> None:
        """Write what a drafter adds to its base into the base's folder.

        Args:
            folder: The base's.
            tensors: What the drafter adds, by name.
            shape: The whole numbers that say its shape.
            eight_bits: Whether matrices are stored at 8 bits, see `dynamo_model.eight_bits`.
        """
        metadata = {"kind": cls.kind, "format": "pt"} | {key: str(value) for key, value in shape.items()}
        if eight_bits:
            tensors, metadata = to_eight_bits(tensors), metadata | {STORAGE: FORM}
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / cls.file, metadata=metadata)
