"""Whether a base can be trained with further heads and exported, judged by running it on a few tokens.

Nothing here knows an architecture by name, and what a configuration says is held against what the model does: its
attention and its rotation are read off it, what it does to its logits is measured, and a further head that holds the
last layer's own weights has to say what the base says.  So what could not be exported is refused before it is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from .attention import LayerAttention, Probe, probe_attention
from .errors import CheckpointError, first_line
from .output import Output
from .parallel import MultiTokenModel
from .rotary import TOLERANCE, Rotary, close, read_rotary

TOKENS = 6


@dataclass(frozen=True)
class Supported:
    """How a model can be expressed.

    Attributes:
        attention: What every layer asks of its attention, in the order of the KV caches, further layers last.
        rotary: Its rotary embedding.
        output: What it does to its logits behind the output embedding.
    """

    attention: dict[int, LayerAttention]
    rotary: Rotary
    output: Output


def preflight(base: PreTrainedModel, context_length: int | None = None, further: int = 1) -> Supported:
    """Find out whether and how a base, and further decoder layers on its penultimate state, can be expressed.

    The base is left as it was.  One in half precision is judged by a copy in float32.

    Args:
        base: Any transformers causal LM.
        context_length: Positions to be covered; None, or more than it has, for all that the model was built for.
        further: Decoder layers that are put on the base; 0 for the base alone.

    Returns:
        What the export needs.

    Raises:
        CheckpointError: Something in it cannot be expressed exactly; one sentence that names the architecture.
    """
    name = type(base).__name__
    try:
        if next(base.parameters()).dtype != torch.float32:
            base = copy.deepcopy(base).float()
        with _evaluated(base), torch.no_grad():
            return _judged(base, context_length, further)
    except CheckpointError as error:
        reason = str(error)
    except Exception as error:  # whatever a model's own code raises when it is run in ways it does not know
        reason = f"it cannot be run as other decoders are ({type(error).__name__}: {first_line(error)})"
    raise CheckpointError(reason if reason.startswith(name) else f"{name} is not supported: {reason}")


@contextmanager
def _evaluated(base: PreTrainedModel) -> Iterator[None]:
    """Yield the base in evaluation mode, and its modes and the random numbers as they were afterwards."""
    training = {module: module.training for module in base.modules()}
    cuda = [base.device] if base.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            base.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _judged(base: PreTrainedModel, context_length: int | None, further: int) -> Supported:
    context = _context(base, context_length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, _vocab(base), (1, min(TOKENS, context)), generator=generator).to(base.device)
    _check_layers(base, _probe(base, base.base_model, ids))
    _check_positions(base, ids)
    _check_operations(base, ids)
    _check_output(base, ids)
    model: nn.Module = base
    run: Any = base.base_model
    if further:
        multi = model = MultiTokenModel(base, 2).eval()
        _check_head(multi, ids)
        run = multi.states
    layers = _probe(model, run, ids, context).layers
    rotary, rotates = read_rotary(base, partial(_probe, model, run, ids), context)
    specs = [replace(layers[layer], rotates=rotates[layer]) for layer in sorted(layers)]
    if further:  # which are all alike
        specs += [replace(specs[-1], layer=len(specs) + i) for i in range(further - 1)]
    return Supported({spec.layer: spec for spec in specs}, rotary, Output.of(base))


def _context(base: PreTrainedModel, wanted: int | None) -> int:
    longest = getattr(base.config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 2:
        raise CheckpointError("its configuration does not say how long its context is (max_position_embeddings)")
    return longest if wanted is None else max(2, min(wanted, longest))


def _vocab(base: PreTrainedModel) -> int:
    embedding: Any = base.get_input_embeddings()
    return len(embedding.weight)


def _probe(model: nn.Module, run: Any, ids: Tensor, context: int | None = None, **inputs: Any) -> Probe:
    """Return one run on token ids; masks are evaluated for so many positions, or for these alone, which is quick."""
    return probe_attention(model, lambda: run(input_ids=ids, use_cache=False, **inputs), context or ids.shape[1])


def _check_layers(base: PreTrainedModel, probe: Probe) -> None:
    """Make sure that every layer attends, and all alike."""
    if not probe.layers:
        raise CheckpointError("it does not attend through transformers' attention interface")
    count = int(base.config.num_hidden_layers)
    without = sorted(set(range(count)) - probe.layers.keys())
    if without:
        raise CheckpointError(
            f"{_listed(without)} of {count} {'does' if len(without) == 1 else 'do'} not attend (a hybrid of attention "
            "and recurrent or convolutional layers, whose state has no place in a KV cache)"
        )
    if sorted(probe.layers) != list(range(count)):
        raise CheckpointError(f"its layers' cache indices are {sorted(probe.layers)}, not 0 to {count - 1}")
    shapes = {(spec.kv_heads, spec.head_size) for spec in probe.layers.values()}
    if len(shapes) > 1:
        raise CheckpointError(f"its layers' caches differ in shape: {sorted(shapes)} heads and head sizes")


def _check_output(base: PreTrainedModel, ids: Tensor) -> None:
    """Make sure that the logits are those of the output embedding, changed behind it as the configuration says.

    What lies behind is measured over logits of every size: those of a small model may be too small to be capped.
    """
    embedding = base.get_output_embeddings()
    if not isinstance(embedding, nn.Linear):
        raise CheckpointError("it has no output embedding that is a linear layer")
    seen: list[Tensor] = []
    vocab = embedding.weight.shape[0]
    sizes = torch.logspace(-3, 3, vocab, device=ids.device) * torch.tensor([1.0, -1.0], device=ids.device)[:, None]
    made_up = sizes[torch.arange(ids.shape[1], device=ids.device) % 2][None]

    def replaced(_: nn.Module, args: tuple[Tensor, ...], product: Tensor) -> Tensor:
        seen.extend((args[0], product))
        return made_up

    state = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
    handle = embedding.register_forward_hook(replaced)
    try:
        changed = base(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    if len(seen) != 2 or not close(state, seen[0]):
        raise CheckpointError("its output embedding does not read what its decoder puts out")
    if not close(F.linear(seen[0], embedding.weight, embedding.bias), seen[1]):
        raise CheckpointError("its output embedding is not a plain linear layer")
    expected = Output.of(base).behind(made_up)
    if changed.shape != expected.shape or not torch.allclose(changed, expected, rtol=TOLERANCE, atol=1e-6):
        raise CheckpointError(
            "it changes its logits behind the output embedding in another way than by the scale and the soft cap of "
            "its configuration"
        )


def _check_head(multi: MultiTokenModel, ids: Tensor) -> None:
    """Make sure that head 1 is the base, and that a further one with the last layer's weights says the same."""
    multi.heads[0].load_state_dict(multi.decoder.layers[-1].state_dict())
    own = multi.base(input_ids=ids, use_cache=False).logits
    first, further = multi(ids)
    if not close(own, first):
        raise CheckpointError("the first head does not give the base's own logits")
    if not close(own, further):
        raise CheckpointError("a further head with the weights of the last layer does not say what the base says")


class _Operations(TorchDispatchMode):
    """Refuses what has no place in a graph of fixed operations."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags)
        name = func.name()
        if name.startswith("aten::index"):  # by numbers it is a look-up, and only by a mask it is a choice
            masks = (each for each in args[1] if each is not None)
            tags = tags if any(each.dtype in (torch.bool, torch.uint8) for each in masks) else set()
        if tags or "grouped_mm" in name:
            raise CheckpointError(
                "its layers choose by their numbers what to compute, as the routing of tokens to experts does: a graph "
                "cannot express that"
            )
        return func(*args, **(kwargs or {}))


def _check_operations(base: PreTrainedModel, ids: Tensor) -> None:
    """Make sure that what the decoder layers compute is fixed."""
    mode = _Operations()
    with ExitStack() as stack:
        for layer in getattr(base.base_model, "layers", ()):
            handles = (
                layer.register_forward_pre_hook(lambda *_: mode.__enter__() and None),
                layer.register_forward_hook(lambda *_: mode.__exit__(None, None, None), always_call=True),
            )
            for handle in handles:
                stack.callback(handle.remove)
        base.base_model(input_ids=ids, use_cache=False)


def _check_positions(base: PreTrainedModel, ids: Tensor) -> None:
    """Make sure that nothing but attention hands anything from a token to a later one.

    With attention to nothing, the states of all other tokens are the same whatever the first token is.
    """
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % _vocab(base)
    states: list[Tensor] = []

    def run(tokens: Tensor) -> None:
        states.append(base.base_model(input_ids=tokens, use_cache=False).last_hidden_state)

    for tokens in (ids, other):
        probe_attention(base, partial(run, tokens), ids.shape[1])
    if not close(states[0][:, 1:], states[1][:, 1:]):
        raise CheckpointError(
            "its layers hand something on from token to token besides attention (a recurrence or a convolution), which "
            "has no place in a KV cache"
        )


def _listed(layers: list[int]) -> str:
    return f"layer{'' if len(layers) == 1 else 's'} {', '.join(map(str, layers))}"
