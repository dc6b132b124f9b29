"""The multi-token model of DynaMo (Tuli et al. 2024, section "Model").

A decoder-only base model becomes an n-token model: the *stem* is every decoder layer but the last, the
first-token head is the base's own last layer, and every further head is one more decoder layer that reads
the stem output.  All heads share the base's final norm and output embedding.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .drafter import DrafterModel
from .errors import CheckpointError
from .limits import MAX_HEADS
from .output import logits_of

_FINAL_NORM_NAMES = ("norm", "final_layer_norm", "final_layernorm", "ln_f")


class MultiTokenModel(DrafterModel):
    """A base language model with further token heads on its penultimate state.

    Args:
        base: any transformers causal LM whose decoder keeps its layers in ``layers``; it is used as it is,
            not copied, and stays the first-token head.
        n_heads: how many tokens one pass predicts, 2 to 8.  The n_heads - 1 new decoder layers start random,
            as the paper's do (a layer copied from the last one trains worse there).

    Raises:
        CheckpointError: ``n_heads`` is out of range or the decoder has a layout that is not known here.
    """

    kind = "parallel"
    file = "heads.safetensors"
    command = "heads"
    sizes: ClassVar = ("n_heads",)

    def __init__(self, base: PreTrainedModel, n_heads: int) -> None:
        super().__init__()
        if not 2 <= n_heads <= MAX_HEADS:
            raise CheckpointError(f"a multi-token model has 2 to {MAX_HEADS} heads, not {n_heads}")
        self.base = base
        layers = getattr(base.base_model, "layers", None)
        if not isinstance(layers, nn.ModuleList) or self._find_final_norm() is None:
            raise CheckpointError(
                f"{type(base).__name__} is not supported: it does not keep its decoder layers in `layers` before one "
                "final norm"
            )
        self.heads = nn.ModuleList(self._new_layer(len(layers) + i) for i in range(n_heads - 1))

    @property
    def n_heads(self) -> int:
        """Number of tokens one pass predicts, the base's own head included."""
        return 1 + len(self.heads)

    @property
    def n_tokens(self) -> int:
        """One for every head."""
        return self.n_heads

    @property
    def decoder(self) -> Any:
        """The base without its output embedding: embedding, layers, final norm."""
        return self.base.base_model

    @property
    def final_norm(self) -> nn.Module:
        """The norm that every head's state passes before the shared output embedding."""
        norm = self._find_final_norm()
        assert norm is not None
        return norm

    @property
    def output_embedding(self) -> nn.Linear:
        """The output embedding that all heads share."""
        return self.base.get_output_embeddings()

    def states(
        self, input_ids: Tensor, *, shared_gradient_scale: float = 1.0, **decoder_inputs: Any
    ) -> tuple[Tensor, ...]:
        """Run one pass up to the output embedding.

        Args:
            input_ids: token ids [batch, seq].
            shared_gradient_scale: factor on the gradient that flows from the further heads into the shared
                weights (stem and final norm): the paper's LR_MB / LR_B.
            decoder_inputs: what the base's decoder takes besides (``attention_mask``, ``position_ids``,
                ``past_key_values`` …); the head layers get exactly what the base's last layer gets.

        Returns:
            One normed hidden state [batch, seq, hidden] a head, the base's first.
        """
        # A cache that the decoder made itself would have no slots for the further heads.
        decoder_inputs.setdefault("use_cache", decoder_inputs.get("past_key_values") is not None)
        seen: dict[str, Any] = {}

        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["args"], seen["kwargs"] = args, kwargs

        handle = self.decoder.layers[-1].register_forward_pre_hook(remember, with_kwargs=True)
        try:
            first = self.decoder(input_ids=input_ids, **decoder_inputs).last_hidden_state
        finally:
            handle.remove()
        stem, *rest = seen["args"]
        stem = scale_gradient(stem, shared_gradient_scale)
        norm_weights = {
            name: scale_gradient(weight, shared_gradient_scale) for name, weight in self.final_norm.named_parameters()
        }
        further = []
        for layer in self.heads:
            state = layer(stem, *rest, **seen["kwargs"])
            state = state[0] if isinstance(state, tuple) else state
            if shared_gradient_scale == 1.0:
                further.append(self.final_norm(state))
            else:
                further.append(torch.func.functional_call(self.final_norm, norm_weights, (state,)))
        return (first, *further)

    def forward(self, input_ids: Tensor, **decoder_inputs: Any) -> tuple[Tensor, ...]:
        """Predict the next n tokens at every position.

        Args:
            input_ids: token ids [batch, seq].
            decoder_inputs: see :meth:`states`.

        Returns:
            One tensor of logits [batch, seq, vocab] a head; entry i at position t is about token t + 1 + i.
        """
        return tuple(logits_of(self.base, state) for state in self.states(input_ids, **decoder_inputs))

    def drafter_state_dict(self) -> dict[str, Tensor]:
        """The further heads' tensors, named ``<head number>.<parameter>`` with the first further head as 2."""
        return {
            f"{number}.{name}": tensor
            for number, layer in enumerate(self.heads, start=2)
            for name, tensor in layer.state_dict().items()
        }

    def _find_final_norm(self) -> nn.Module | None:
        found = (getattr(self.decoder, name, None) for name in _FINAL_NORM_NAMES)
        return next((norm for norm in found if norm is not None), None)

    def _new_layer(self, layer_idx: int) -> nn.Module:
        """One decoder layer like the base's last, randomly initialised, with its own KV cache slot."""
        last = self.decoder.layers[-1]
        config = copy.deepcopy(self.config)
        layers = config.num_hidden_layers
        config.num_hidden_layers = layer_idx + 1
        reference = next(last.parameters())
        try:
            for name, value in vars(self.config).items():  # the head is what the base's last layer is, by every list
                if isinstance(value, list) and len(value) == layers:
                    setattr(config, name, value + value[-1:] * (layer_idx + 1 - layers))
            with torch.device(reference.device):
                layer = type(last)(config, layer_idx).to(reference.dtype)
        except Exception as error:  # whatever a model's own code raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{type(self.base).__name__} is not supported: its configuration makes no further decoder layer "
                f"({reason})"
            ) from error
        layer.apply(self.base._init_weights)
        for module in layer.modules():  # one attention implementation for the whole model
            if hasattr(module, "config"):
                module.config = self.config
        return layer.train(last.training)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Return ``x`` itself; its gradient is multiplied by ``scale`` on the way back."""
    return x if scale == 1.0 else _ScaleGradient.apply(x, scale)
