"""The multi-token model of DynaMo (Tuli et al. 2024, section "Model").

A decoder-only base model becomes an n-token model: the *stem* is every decoder layer but the last, the
first-token head is the base's own last layer, and every further head is one more decoder layer that reads
the stem output.  All heads share the base's final norm and output embedding.

Two things are optional.  A *draft vocabulary* has the further heads choose among the words that are frequent, which
makes their output embedding as much smaller.  A *condition* tells a head what was drafted in front of the token that
it predicts (Hydra: Ankner et al. 2024, arXiv 2402.05109), of which independent heads know nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .drafter import DrafterModel
from .errors import CheckpointError
from .limits import MAX_HEADS
from .output import Output, logits_of

CONDITION_WIDTH = 384
"""Hidden units of a condition, unless the base is narrower."""

_FINAL_NORM_NAMES = ("norm", "final_layer_norm", "final_layernorm", "ln_f")


@dataclass(frozen=True)
class Penultimate:
    """What a base's last layer is given, and with it every further head.

    Attributes:
        stem: The penultimate state [batch, seq, hidden].
        rest: What it gets besides, by position.
        keywords: And by keyword: mask, rotary factors, cache; they do not depend on the text.
    """

    stem: Tensor
    rest: tuple[Any, ...]
    keywords: dict[str, Any]


class Condition(nn.Module):
    """What the token in front changes in a further head's state: `s + W2 silu(W1 [s ; e])`, at first nothing.

    Args:
        width: Hidden units; W1 is `hidden.weight` [width, 2 · hidden], W2 is `out.weight` [hidden, width].
        embedding: The base's input embedding [vocab, hidden].
    """

    def __init__(self, width: int, embedding: Tensor) -> None:
        super().__init__()
        size = embedding.shape[1]
        placement: dict[str, Any] = {"dtype": embedding.dtype, "device": embedding.device}
        self.hidden = nn.Linear(2 * size, width, bias=False, **placement)
        self.out = nn.Linear(width, size, bias=False, **placement)
        with torch.no_grad():  # behind a norm numbers are about 1; those of an embedding are small, and count as much
            nn.init.normal_(self.hidden.weight, std=(2 * size) ** -0.5)
            self.hidden.weight[:, size:] /= embedding.square().mean().sqrt()
            nn.init.zeros_(self.out.weight)

    def forward(self, state: Tensor, embedded: Tensor) -> Tensor:
        """Return the conditioned state.

        Args:
            state: Behind the final norm, s [..., hidden].
            embedded: Row of the input embedding of the token in front, e [..., hidden].
        """
        return state + self.out(F.silu(self.hidden(torch.cat([state, embedded], dim=-1))))


class MultiTokenModel(DrafterModel):
    """A base language model with further token heads on its penultimate state.

    Args:
        base: Any transformers causal LM whose decoder keeps its layers in `layers`; it is used as it is,
            not copied, and stays the first-token head.
        n_heads: How many tokens one pass predicts, 2 to 8.  The n_heads - 1 new decoder layers start random,
            as the paper's do (a layer copied from the last one trains worse there).
        draft_vocabulary: Ids of the words that further heads choose among, the most frequent first, int64 [words];
            None for all.  The base's own head chooses among all words in any case.
        conditioned: Whether every further head has a `Condition`.
        condition_width: Its hidden units, never more than the base's hidden size.

    Attributes:
        draft_vocabulary: As above.
        conditions: One `Condition` for every further head, or none at all.

    Raises:
        CheckpointError: `n_heads` is out of range, the decoder has a layout that is not known here, or the draft
            vocabulary is no list of different words of the base.
    """

    kind = "parallel"
    file = "heads.safetensors"
    command = "heads"
    sizes: ClassVar = ("n_heads",)

    draft_vocabulary: Tensor | None

    def __init__(
        self,
        base: PreTrainedModel,
        n_heads: int,
        *,
        draft_vocabulary: Tensor | None = None,
        conditioned: bool = False,
        condition_width: int = CONDITION_WIDTH,
    ) -> None:
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
        if draft_vocabulary is not None:
            _check_words(draft_vocabulary, len(self.output_embedding.weight))
            draft_vocabulary = draft_vocabulary.to(base.device)
        self.register_buffer("draft_vocabulary", draft_vocabulary)
        self.conditions = nn.ModuleList()
        if conditioned:
            self.add_conditions(condition_width)

    def add_conditions(self, width: int = CONDITION_WIDTH) -> None:
        """Give every further head a new `Condition`, which leaves its predictions as they are until trained.

        Args:
            width: Hidden units, never more than the base's hidden size.

        Raises:
            CheckpointError: `width` is not a positive number.
        """
        if width < 1:
            raise CheckpointError(f"a condition has one hidden unit or more, not {width}")
        embedding = self._input_embedding
        width = min(width, embedding.shape[1])
        self.conditions = nn.ModuleList(Condition(width, embedding) for _ in self.heads)
        self.conditions.train(self.heads.training)

    @property
    def conditioned(self) -> bool:
        """Whether further heads depend on the token in front of the one they predict."""
        return len(self.conditions) > 0

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

    @property
    def _input_embedding(self) -> Tensor:
        """The base's input embedding [vocab, hidden], as a constant."""
        embedding: Any = self.base.get_input_embeddings()
        return embedding.weight.detach()

    def states(
        self, input_ids: Tensor, *, shared_gradient_scale: float = 1.0, **decoder_inputs: Any
    ) -> tuple[Tensor, ...]:
        """Run one pass up to the output embedding.

        Args:
            input_ids: Token ids [batch, seq].
            shared_gradient_scale: Factor on the gradient that flows from the further heads into the shared
                weights (stem and final norm): the paper's LR_MB / LR_B.
            decoder_inputs: What the base's decoder takes besides (`attention_mask`, `position_ids`,
                `past_key_values` …); the head layers get exactly what the base's last layer gets.

        Returns:
            One normed hidden state [batch, seq, hidden] a head, the base's first; not conditioned yet.
        """
        first, given = self.penultimate(input_ids, **decoder_inputs)
        return (first, *self.further_states(given, shared_gradient_scale=shared_gradient_scale))

    def penultimate(self, input_ids: Tensor, **decoder_inputs: Any) -> tuple[Tensor, Penultimate]:
        """Run the base, and keep what its last layer was given.

        Args:
            input_ids: Token ids [batch, seq].
            decoder_inputs: See `states`.

        Returns:
            The base's own normed state [batch, seq, hidden], and what every head reads.
        """
        # A cache that the decoder made itself would have no slots for the further heads.
        decoder_inputs.setdefault("use_cache", decoder_inputs.get("past_key_values") is not None)
        seen: list[Penultimate] = []

        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(Penultimate(args[0], args[1:], kwargs))

        handle = self.decoder.layers[-1].register_forward_pre_hook(remember, with_kwargs=True)
        try:
            first = self.decoder(input_ids=input_ids, **decoder_inputs).last_hidden_state
        finally:
            handle.remove()
        return first, seen[0]

    def further_states(self, given: Penultimate, *, shared_gradient_scale: float = 1.0) -> tuple[Tensor, ...]:
        """Return what the further heads make of what the base's last layer was given.

        Args:
            given: Of `penultimate`.
            shared_gradient_scale: See `states`.

        Returns:
            One normed hidden state [batch, seq, hidden] a further head; not conditioned yet.
        """
        stem = scale_gradient(given.stem, shared_gradient_scale)
        norm_weights = {
            name: scale_gradient(weight, shared_gradient_scale) for name, weight in self.final_norm.named_parameters()
        }
        further = []
        for layer in self.heads:
            state = layer(stem, *given.rest, **given.keywords)
            state = state[0] if isinstance(state, tuple) else state
            if shared_gradient_scale == 1.0:
                further.append(self.final_norm(state))
            else:
                further.append(torch.func.functional_call(self.final_norm, norm_weights, (state,)))
        return tuple(further)

    def condition(self, head: int, state: Tensor, previous: Tensor) -> Tensor:
        """Tell a further head which token is in front of the one that it predicts.

        Args:
            head: Its number, from 2 on; head i predicts token t + i at position t.
            state: Its state of `states` [..., hidden].
            previous: Ids of the tokens in front, t + i - 1 [...].

        Returns:
            The state that its logits are made of [..., hidden]: `state` itself if the model is not conditioned.
        """
        if not self.conditioned:
            return state
        return self.conditions[head - 2](state, F.embedding(previous, self._input_embedding))

    def draft_logits(self, state: Tensor) -> Tensor:
        """Return logits of a further head over the draft vocabulary, in its order [..., words].

        Without a draft vocabulary they are over all words.

        Args:
            state: Of `condition` [..., hidden].
        """
        words = self.draft_vocabulary
        if words is None:
            return logits_of(self.base, state)
        weight, bias = self.output_embedding.weight, self.output_embedding.bias
        return Output.of(self.base)(state, weight[words], None if bias is None else bias[words])

    def forward(self, input_ids: Tensor, **decoder_inputs: Any) -> tuple[Tensor, ...]:
        """Predict the next n tokens at every position.

        A conditioned head is told the token in front as far as `input_ids` have it, and behind their end the
        first choice of the head before it, as in greedy drafting.

        Args:
            input_ids: Token ids [batch, seq].
            decoder_inputs: See `states`.

        Returns:
            One tensor of logits [batch, seq, vocab] a head; entry i at position t is about token t + 1 + i.  Words
            that are not in the draft vocabulary have -inf in further heads.
        """
        first, *further = self.states(input_ids, **decoder_inputs)
        logits = [logits_of(self.base, first)]
        for head, state in enumerate(further, start=2):
            if self.conditioned:
                known = input_ids[:, head - 1 :]
                previous = torch.cat([known, logits[-1].argmax(-1)[:, known.shape[1] :]], dim=1)
                state = self.condition(head, state, previous)
            logits.append(self._of_all_words(self.draft_logits(state)))
        return tuple(logits)

    def drafter_state_dict(self) -> dict[str, Tensor]:
        """Return the further heads' tensors, named `<head number>.<parameter>` with the first further head as 2.

        With them `<head number>.condition.hidden.weight` and `….out.weight`, and `draft_vocabulary`, if any.
        """
        tensors = {
            f"{number}.{name}": tensor
            for number, layer in enumerate(self.heads, start=2)
            for name, tensor in layer.state_dict().items()
        }
        for number, condition in enumerate(self.conditions, start=2):
            tensors |= {f"{number}.condition.{name}": tensor for name, tensor in condition.state_dict().items()}
        return tensors | ({} if self.draft_vocabulary is None else {"draft_vocabulary": self.draft_vocabulary})

    @classmethod
    def _shaped(cls, base: PreTrainedModel, tensors: Mapping[str, Tensor], shape: Mapping[str, int]) -> Self:
        hidden = tensors.get("2.condition.hidden.weight")
        width = CONDITION_WIDTH if hidden is None else (*hidden.shape, 0)[0]
        return cls(
            base,
            n_heads=shape.get("n_heads", 0),
            draft_vocabulary=tensors.get("draft_vocabulary"),
            conditioned=hidden is not None,
            condition_width=width,
        )

    def _of_all_words(self, logits: Tensor) -> Tensor:
        """Return logits [..., vocab] of those over the draft vocabulary [..., words]."""
        if self.draft_vocabulary is None:
            return logits
        every = logits.new_full((*logits.shape[:-1], len(self.output_embedding.weight)), -torch.inf)
        return every.index_copy(-1, self.draft_vocabulary, logits)

    def _find_final_norm(self) -> nn.Module | None:
        found = (getattr(self.decoder, name, None) for name in _FINAL_NORM_NAMES)
        return next((norm for norm in found if norm is not None), None)

    def _new_layer(self, layer_idx: int) -> nn.Module:
        """Return one decoder layer like the base's last, randomly initialised, with its own KV cache slot."""
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


def _check_words(words: Tensor, vocab_size: int) -> None:
    """Refuse what is no draft vocabulary.

    Raises:
        CheckpointError: It is none.
    """
    if words.dtype != torch.int64 or words.ndim != 1 or not len(words):
        shape = f"{str(words.dtype).removeprefix('torch.')} {list(words.shape)}"
        raise CheckpointError(f"a draft vocabulary is a list of token ids, int64 [words], not {shape}")
    outside = words[(words < 0) | (words >= vocab_size)]
    if len(outside):
        raise CheckpointError(f"the draft vocabulary names token {outside[0]}: the base has {vocab_size}")
    if len(words.unique()) < len(words):
        raise CheckpointError("the draft vocabulary names a token twice")


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Return `x` itself; its gradient is multiplied by `scale` on the way back."""
    return x if scale == 1.0 else _ScaleGradient.apply(x, scale)
