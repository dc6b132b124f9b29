"""What preflight says of a base, what it refuses, and that it leaves the base as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import checkpoints
from support.refused import REFUSED
from transformers import LlamaConfig

from dynamo_model import CheckpointError, LookAheadModel
from dynamo_model.attention import window_of
from dynamo_model.output import Output
from dynamo_model.preflight import preflight
from dynamo_model.rotary import rotated

Rule = Callable[..., torch.Tensor]

# Windows of the layers, their soft caps, whether they rotate, and what lies behind the output embedding.
READ: dict[str, tuple[list[int | None], float, list[bool], Output]] = {
    "llama-grouped": ([None, None], 0.0, [True, True], Output()),
    "qwen2-mixed-window": ([None, 17], 0.0, [True, True], Output()),
    "granite": ([None, None], 0.0, [True, True], Output(scale=1 / 3)),
    "cohere": ([None, None], 0.0, [True, True], Output(scale=0.25)),
    "cohere2": ([None, 18], 0.0, [False, True], Output(scale=2.5)),
    "gemma2": ([19, None], 3.0, [True, True], Output(softcap=0.5)),
    "exaone4": ([22, None], 0.0, [True, False], Output()),
    "smollm3": ([None, None], 0.0, [True, False], Output()),
}


def base_of(name: str) -> Any:
    return checkpoints.random_base(checkpoints.CONFIGS[name])


@pytest.mark.parametrize("name", READ)
def test_what_is_read_off_a_base(name: str) -> None:
    """Further layers are as the last one is."""
    windows, softcap, rotates, output = READ[name]
    found = preflight(base_of(name), further=2)
    layers = list(found.attention.values())
    assert [spec.layer for spec in layers] == [0, 1, 2, 3] == list(found.attention)
    assert [spec.window for spec in layers] == windows + windows[-1:] * 2
    assert [spec.rotates for spec in layers] == rotates + rotates[-1:] * 2
    assert {spec.softcap for spec in layers} == {softcap} and found.output == output
    assert len(preflight(base_of(name), further=0).attention) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_left_as_it_was(dtype: torch.dtype) -> None:
    """Weights, buffers, modes, gradients, attention, modules, configuration and random numbers."""
    base = base_of("gemma2").to(dtype).train()
    base.model.layers[0].eval()

    def state() -> list[Any]:
        modules = [(name, type(module), module.training) for name, module in base.named_modules()]
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.modules()]
        gradients = [(name, p.requires_grad, p.grad) for name, p in base.named_parameters()]
        config = base.config.to_dict() | {"attention": base.config._attn_implementation}
        return [modules, hooks, gradients, config, torch.get_rng_state().tolist()]

    before, tensors = state(), copy.deepcopy(base.state_dict() | dict(base.named_buffers()))
    found = preflight(base)
    assert state() == before
    after = base.state_dict() | dict(base.named_buffers())
    assert all(after[name].dtype == t.dtype and torch.equal(after[name], t) for name, t in tensors.items())
    assert found.output == Output(softcap=0.5)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str) -> None:
    config, reason = REFUSED[name]
    base = checkpoints.random_base(config)
    with pytest.raises(CheckpointError) as refused:
        preflight(base)
    message = str(refused.value)
    assert message.startswith(type(base).__name__) and reason in message and "\n" not in message


def test_rope_scaling_that_depends_on_the_length() -> None:
    """Refused for the whole context, and fine within the length up to which there is one table."""
    rope = checkpoints.rope(
        "longrope", factor=3.0, short_factor=[1.5] * 8, long_factor=[2.0] * 8, original_max_position_embeddings=32
    )
    base = checkpoints.random_base(LlamaConfig(**checkpoints.SIZES, rope_parameters=rope))
    inverse = base.model.rotary_emb.inv_freq.clone()
    with pytest.raises(CheckpointError, match="LlamaForCausalLM is not supported: rope scaling 'longrope' changes"):
        preflight(base)
    assert preflight(base, 32).rotary.cos.shape == (32, 16)
    assert torch.equal(base.model.rotary_emb.inv_freq, inverse)


def patched(monkeypatch: pytest.MonkeyPatch, owner: Any, change: Callable[..., Any]) -> None:
    """Has a method `forward` go through `change(own, *arguments)`."""
    own = owner.forward
    monkeypatch.setattr(owner, "forward", lambda *args, **kwargs: change(own, *args, **kwargs))


def unlike_its_configuration(own: Any, *args: Any, **kwargs: Any) -> Any:
    out = own(*args, **kwargs)
    out.logits = 1.5 * out.logits
    return out


def running_sum(own: Any, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return own(x, **kwargs) + 0.1 * x.cumsum(1)


def only_the_large(own: Any, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    out = own(x, **kwargs)
    out[out > 0.1] *= 2
    return out


def with_sinks(own: Any, *args: Any, **kwargs: Any) -> Any:
    return own(*args, **kwargs, sinks=torch.zeros(4))


def another_table(own: Any, x: torch.Tensor, position_embeddings: Any, **kwargs: Any) -> torch.Tensor:
    cos, sin = position_embeddings
    return own(x, position_embeddings=(sin, cos), **kwargs)


def broken(own: Any, *args: Any, **kwargs: Any) -> Any:
    raise IndexError("list index\nout of range")


@pytest.mark.parametrize(
    ("at", "change", "reason"),
    [
        ("", unlike_its_configuration, "it changes its logits behind the output embedding in another way"),
        ("model.layers.1", running_sum, "hand something on from token to token besides attention"),
        ("model.layers.0", only_the_large, "choose by their numbers what to compute"),
        ("model.layers.1.self_attn", with_sinks, "layer 1 gives its attention `sinks`"),
        ("model.layers.1", another_table, "further head with the weights of the last layer does not say what"),
        ("model.norm", broken, r"cannot be run as other decoders are \(IndexError: list index\)"),
    ],
)
def test_what_no_configuration_says(
    at: str, change: Callable[..., Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that does something of its own is caught by running it, and raises nothing but the one sentence."""
    base = base_of("llama-grouped")
    patched(monkeypatch, base.get_submodule(at), change)
    with pytest.raises(CheckpointError, match=f"^LlamaForCausalLM is not supported: .*{reason}"):
        preflight(base)


def test_a_scale_that_the_base_does_not_apply() -> None:
    """What the configuration says is not believed."""
    base = base_of("llama-grouped")
    base.config.logits_scaling = 2.0
    with pytest.raises(CheckpointError, match="it changes its logits behind the output embedding in another way"):
        preflight(base)


def test_a_layer_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder whose layers weigh what they add by their place in it: a further head is no last layer."""
    base = base_of("llama-grouped")
    kind = type(base.model.layers[0].mlp)
    own = kind.forward
    places = {layer.mlp: place for place, layer in enumerate(base.model.layers)}
    monkeypatch.setattr(kind, "forward", lambda self, x: own(self, x) * (1 + places.get(self, 2)))
    with pytest.raises(CheckpointError, match="a further head with the weights of the last layer does not say"):
        preflight(base)
    preflight(base, further=0)


def test_look_ahead_embeddings_need_a_plain_table() -> None:
    """A base that scales what it looks up, or embeds more tokens than it predicts, is refused."""
    with pytest.raises(CheckpointError, match="GemmaForCausalLM does more to its input embedding than look it up"):
        LookAheadModel(base_of("gemma"), 2)
    base = base_of("llama-grouped")
    base.set_output_embeddings(torch.nn.Linear(64, checkpoints.VOCAB - 4, bias=False))
    with pytest.raises(CheckpointError, match="embeds 320 tokens and predicts 316"):
        LookAheadModel(base, 2)


def causal(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Every key before the query."""
    return key <= query


def test_window_of_reads_the_rule() -> None:
    """The window is what the rule does, not what a configuration calls it."""
    assert window_of(causal, 50, 0) is None
    assert window_of(lambda b, h, q, k: (k <= q) & (k > q - 7), 50, 0) == 7
    assert window_of(lambda b, h, q, k: (k <= q) & (k > q - 1), 50, 0) == 1
    assert window_of(lambda b, h, q, k: (k <= q) & (k > q - 50), 50, 0) is None


@pytest.mark.parametrize(
    "rule",
    [
        lambda b, h, q, k: (k <= q) & (k // 8 == q // 8),  # chunked attention
        lambda b, h, q, k: (k <= q) | (k < 4),  # bidirectional prefix
        lambda b, h, q, k: (k <= q) & ((k > q - 7) | (k < 2)),  # window with attention sinks
        lambda b, h, q, k: k < 100,  # bidirectional
    ],
)
def test_other_masks_are_refused(rule: Rule) -> None:
    """Anything but causal with a window cannot be expressed."""
    with pytest.raises(CheckpointError, match="layer 3 has an attention mask that is neither"):
        window_of(rule, 50, 3)


def test_rotated_turns_pairs() -> None:
    """By hand: 90 degrees turn (a, b) into (-b, a); what lies beyond the rotary size stays."""
    x = torch.arange(1.0, 6.0).reshape(1, 1, 1, 5)
    cos, sin = torch.zeros(1, 2), torch.ones(1, 2)
    assert rotated(x, cos, sin, interleaved=False).flatten().tolist() == [-3, -4, 1, 2, 5]
    assert rotated(x, cos, sin, interleaved=True).flatten().tolist() == [-2, 1, -4, 3, 5]
