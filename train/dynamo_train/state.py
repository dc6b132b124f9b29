"""What a run goes on from: weights, optimizers and random numbers as safetensors, the rest as JSON; no pickle."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import gather
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dynamo_runtime.version import __version__

from .errors import TrainingError
from .objective import Objective
from .spread import part_as, processes, whole
from .tokens import TokenStreams

logger = logging.getLogger(__name__)

PROGRESS, MODEL, OPTIMIZER, RANDOM = "progress.json", "model.safetensors", "optimizer.safetensors", "random.safetensors"
_OF_A_PATH = ("_name_or_path", "transformers_version")  # in configurations; says nothing of the result


def fingerprint(objective: Objective, streams: TokenStreams, recipe: Any) -> dict[str, Any]:
    """Return everything that decides the result of a run, to be taken before its first step.

    Over how many processes a batch is divided is not in it: a step is the same but for the order of sums, and for the
    random numbers of dropout.

    Args:
        objective: The model as it starts, base and what is new, and what it is trained by.
        streams: The tokens.
        recipe: Of the training.
    """
    config = getattr(objective.model, "config", None)
    shape = config.to_dict() if config is not None else {}
    corpus = asdict(streams.record)
    del corpus["source"]  # where the text lies does not matter
    whole = {
        "recipe": asdict(recipe),
        "objective": {"kind": type(objective).__name__} | objective.settings,
        "model": {name: value for name, value in shape.items() if name not in _OF_A_PATH},
        "weights": sha256(_tensors(objective)),
        "corpus": corpus,
        "tokenizer": streams.tokenizer,
        "versions": {"dynamo-edge": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    return json.loads(json.dumps(whole, default=str))


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return what two fingerprints do not agree on, each in words."""
    found = []
    for name in sorted({*there, *here}):
        before, now = there.get(name), here.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now, f"{prefix}{name}.")
        elif before != now:
            found.append(f"{prefix}{name} was {_short(before)} and is {_short(now)}")
    return found


def save(
    folder: Path | None,
    objective: Objective,
    optimizers: Sequence[Optimizer],
    schedules: Sequence[LRScheduler],
    random: Mapping[str, Tensor],
    progress: Mapping[str, Any],
) -> None:
    """Write a checkpoint into an empty folder; the same one whether the model is sharded or not.

    Args:
        folder: Where to; None in the processes that are not the main one, which have to call it as well.
        objective: Whose weights.
        optimizers: Their states, with `schedules`, one for each.
        schedules: Of the learning rates.
        random: From `random_state`, of this process.
        progress: What else there is to say, as JSON.
    """
    states = {
        f"{i}.{number}.{name}": tensor
        for i, optimizer in enumerate(optimizers)
        for number, state in optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }
    _save_whole(_tensors(objective), folder, MODEL)
    _save_whole(states, folder, OPTIMIZER)
    everyone = _of_all_processes(random)
    if folder is None:
        return
    save_file(everyone, folder / RANDOM)
    rates = [{"steps": schedule.last_epoch, "rates": schedule.get_last_lr()} for schedule in schedules]
    (folder / PROGRESS).write_text(json.dumps({**progress, "schedules": rates, "states": len(states)}))


def read_progress(folder: Path) -> dict[str, Any] | None:
    """Return what `save` was told of a checkpoint; None if there is no checkpoint.

    Raises:
        TrainingError: There is, and it is damaged or not one of this version.
    """
    if not folder.exists():
        return None
    try:
        progress = json.loads((folder / PROGRESS).read_text())
        if not isinstance(progress["fingerprint"], dict):
            raise TypeError
        step, validations = progress["step"], progress["validations"]
        if not (isinstance(step, int) and step >= 0 and all(isinstance(each, float) for each in validations)):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{folder} is damaged, or of another version of dynamo-train: remove it to start over"
        ) from error
    return progress


def restore(
    folder: Path,
    objective: Objective,
    optimizers: Sequence[Optimizer],
    schedules: Sequence[LRScheduler],
    seed: int,
) -> None:
    """Take up what `save` wrote.

    Random numbers go on where they were if there were as many processes, and else begin anew, by `seed`, step and
    process.

    Raises:
        TrainingError: It is damaged, or belongs to something else.
    """
    try:
        ours = _tensors(objective)
        stored = load_file(folder / MODEL)
        _check(stored, ours)
        progress = json.loads((folder / PROGRESS).read_text())
        found = load_file(folder / OPTIMIZER)
        if len(found) != progress["states"]:
            raise ValueError("states of an optimizer are missing or too much")
        states = _optimizer_states(found, optimizers)
        random = _random_states(load_file(folder / RANDOM))
        rates = [(int(each["steps"]), [float(rate) for rate in each["rates"]]) for each in progress["schedules"]]
        if [len(each) for _, each in rates] != [len(optimizer.param_groups) for optimizer in optimizers]:
            raise ValueError("learning rates of other parameters")
        _set_random(random, seed, progress["step"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise TrainingError(f"{folder} is damaged ({error}): remove it to start over") from error
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(part_as(stored[name], tensor))
    for optimizer, schedule, state, (steps, each) in zip(optimizers, schedules, states, rates, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(
            {"state": state, "param_groups": [group | {"lr": rate} for group, rate in zip(groups, each, strict=True)]}
        )
        schedule.last_epoch, schedule._step_count, schedule._last_lr = steps, steps + 1, list(each)


def random_state() -> dict[str, Tensor]:
    """Return the random numbers that training draws from: torch's, on this process' devices."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _of_all_processes(random: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return random states by process and name."""
    device = processes().device
    found = {name: gather(state[None].to(device)).cpu() for name, state in random.items()}
    return {f"{rank}.{name}": state.clone() for name, states in found.items() for rank, state in enumerate(states)}


def _random_states(stored: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Of every process.

    Raises:
        ValueError: They are none of this machine's.
    """
    ranks = len({name.partition(".")[0] for name in stored})
    expected = random_state()
    _check(stored, {f"{rank}.{name}": state for rank in range(max(1, ranks)) for name, state in expected.items()})
    return [{name: stored[f"{rank}.{name}"] for name in expected} for rank in range(ranks)]


def _set_random(states: Sequence[Mapping[str, Tensor]], seed: int, step: int) -> None:
    process = processes()
    if len(states) != process.num_processes:
        logger.info(
            "the checkpoint is of %d process(es) and this is a run of %d: the result is another one by roundings, "
            "and by dropout if there is any",
            *(len(states), process.num_processes),
        )
        drawn = np.random.SeedSequence([seed, step, process.process_index]).generate_state(1, np.uint32)
        torch.manual_seed(int(drawn[0]))
        return
    mine = states[process.process_index]
    torch.set_rng_state(mine["cpu"])
    if "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"])


def _save_whole(tensors: Mapping[str, Tensor], folder: Path | None, file: str) -> None:
    """Write tensors of which every process may hold a part, in the process that has a folder."""
    found = {name: whole(tensor.detach()) for name, tensor in tensors.items()}
    if folder is not None:
        save_file({name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}, folder / file)


def _optimizer_states(
    stored: Mapping[str, Tensor], optimizers: Sequence[Optimizer]
) -> list[dict[int, dict[str, Tensor]]]:
    """Return states by the number of their parameter, for every optimizer.

    Raises:
        ValueError: They are not those of these parameters.
    """
    states: list[dict[int, dict[str, Tensor]]] = []
    for i, optimizer in enumerate(optimizers):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        expected = [_expected(optimizer, parameter) for parameter in parameters]
        states.append({})
        for number, each in enumerate(expected):
            prefix = f"{i}.{number}."
            found = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
            if found:  # none before a parameter's first gradient
                _check(found, each)
                states[-1][number] = {name: part_as(value, each[name]) for name, value in found.items()}
    if sum(len(state) for each in states for state in each.values()) != len(stored):
        raise ValueError("states of other parameters")
    return states


def _expected(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return what a state looks like."""
    if isinstance(optimizer, torch.optim.Muon):
        return {"momentum_buffer": parameter}
    return {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}


def _check(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if wrong := sorted({*found} ^ {*expected}):
        raise ValueError(f"{wrong[0]} is missing or too much")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise ValueError(f"{name} has another shape or type")


def _tensors(objective: Objective) -> dict[str, Tensor]:
    """Return parameters and buffers by name, those that are tied once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in objective.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"
