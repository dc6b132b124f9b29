"""How a run is spread over processes, and how it saves memory and time; nothing of its result but roundings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather, pad_across_processes, parse_flag_from_env, reduce
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .errors import TrainingError

COMPILERS = ("g++", "clang++", "cl")
"""That torch looks for, behind $CXX."""


@dataclass(frozen=True)
class Memory:
    """What a run does to need less memory and time; a checkpoint goes on with any other choice.

    Attributes:
        shard: Keep a part of every parameter, gradient and optimizer state in each process (FSDP2: Zhao et al. 2023,
            arXiv 2304.11277), not a copy.
        checkpoint_activations: Of a decoder layer keep what goes in alone, and run it once more on the way back (Chen
            et al. 2016, arXiv 1604.06174).
        compile: Have torch translate decoder layers into one kernel for many operations (Ansel et al. 2024,
            DOI 10.1145/3620665.3640366), which takes its time in the first steps.
    """

    shard: bool = False
    checkpoint_activations: bool = False
    compile: bool = False

    def check(self) -> None:
        """Find out before the work begins whether a model can be sharded, and compiled.

        Raises:
            TrainingError: There is one process, or no C++ compiler.
        """
        if self.compile and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), *COMPILERS)))):
            raise TrainingError(
                "--compile needs a C++ compiler, and there is none: install one (apt install g++), or leave it out"
            )
        if self.shard and processes().num_processes == 1:
            raise TrainingError(
                "--shard divides a model among processes, and there is one: start several, as with "
                "`torchrun --nproc-per-node 8 -m dynamo_train.train …`"
            )


PLAIN = Memory()
"""A whole copy in every process, activations as they come, and layers as they are."""


def processes() -> PartialState:
    """Return this process among all of a run.

    On processors accelerate looks for others only if it is told that it runs there; else each would be the main one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def spread(objective: nn.Module, accelerator: Accelerator, memory: Memory) -> nn.Module:
    """Put a model on the device of every process, whole or in parts.

    Args:
        objective: Losses and model, changed in place; sharded parameters are others than before.
        accelerator: Of the run.
        memory: How.

    Returns:
        What is called in place of the objective, so that gradients are means over all processes.
    """
    if memory.checkpoint_activations:
        checkpoint_activations(objective)
    if memory.compile:
        compile_layers(objective)
    if not memory.shard:
        prepared: nn.Module = accelerator.prepare(objective)
        return prepared
    shard(objective, accelerator.device)
    return objective


def checkpoint_activations(objective: nn.Module) -> None:
    """Have every decoder layer, further heads' included, run once more on the way back; in training mode alone.

    Raises:
        TrainingError: The layers are of a kind that transformers does not do this for.
    """
    layers = list(_layers(objective))
    if not layers:
        raise TrainingError("the layers of this base cannot run twice: leave --checkpoint-activations out")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def compile_layers(objective: nn.Module) -> None:
    """Have torch compile every decoder layer, further heads' included, when it first runs; names stay as they are.

    A layer and not the model: all layers are alike and share what is compiled, and hooks between them stay.

    Raises:
        TrainingError: The layers are of a kind that transformers has no common class for.
    """
    layers = list(_layers(objective))
    if not layers:
        raise TrainingError("the layers of this base cannot be told apart: leave --compile out")
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)


def shard(objective: nn.Module, device: torch.device) -> None:
    """Keep a part of every parameter in each process, cut along its first dimension.

    A decoder layer is whole while it runs; what is outside of layers (embeddings, final norm, what else is new) while
    the objective does.
    """
    mesh = init_device_mesh(device.type, (processes().num_processes,))
    for layer in _layers(objective):
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(objective, "figures")
    if device.type == "cpu":  # gloo sums, but knows no mean
        for module in _sharded(objective):
            module.set_force_sum_reduction_for_comms(True)


def unshard(objective: nn.Module) -> None:
    """Put whole parameters in the place of sharded ones, in the main process' memory; the others keep their parts.

    Every process has to call it, and nothing can be trained behind it.
    """
    found: dict[DTensor, nn.Parameter | None] = {}  # a parameter that is tied stays so
    for module in _sharded(objective):
        module.reshard()
    for owner in objective.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                if parameter not in found:
                    tensor = whole(parameter.detach())
                    found[parameter] = nn.Parameter(tensor, parameter.requires_grad) if tensor is not None else None
                if found[parameter] is not None:
                    setattr(owner, name, found[parameter])


def whole(tensor: Tensor) -> Tensor | None:
    """Return a tensor of which every process may hold a part, in the main process.

    In others it is None. Every process has to ask.

    A part is moved to the processor's memory, as the whole need not fit into an accelerator's.
    """
    found = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
    return found if processes().is_main_process else None


def part_as(tensor: Tensor, example: Tensor) -> Tensor:
    """Of a whole tensor, which every process has, the part that a process holds of another one of its shape."""
    if not isinstance(example, DTensor):
        return tensor
    mesh = example.device_mesh
    return distribute_tensor(tensor.to(example.device), mesh, example.placements, src_data_rank=None)


def summed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Sum over all processes, in the processor's memory."""
    state = processes()
    if state.num_processes == 1:
        return tensors
    return tuple(reduce(tensor.to(state.device), "sum").cpu() for tensor in tensors)


def of_all(text: str) -> list[str]:
    """Return what every process has to say."""
    state, data = processes(), text.encode()
    if state.num_processes == 1:
        return [text]
    sizes = gather(torch.tensor([len(data)], device=state.device)).tolist()
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(state.device)
    rows = gather(pad_across_processes(mine[None], dim=1)).cpu()
    return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes, strict=True)]


def _layers(objective: nn.Module) -> Iterator[Any]:
    """Yield the decoder layers of a base and of what is new."""
    return (module for module in objective.modules() if isinstance(module, GradientCheckpointingLayer))


def _sharded(objective: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in objective.modules() if isinstance(module, FSDPModule))
