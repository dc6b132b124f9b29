"""What training optimises: the interface all objectives share, and cross-entropy of heads that each predict a token."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import LinearCrossEntropyOptions
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dynamo_model.output import Output
from dynamo_model.parallel import scale_gradient

from .recipe import Recipe
from .spread import processes, summed
from .tokens import TokenStreams, batch, validation_batches

CAPPED_LOGITS = 1 << 25
"""Soft-capped logits that may exist at once: 128 MiB in float32."""


class Objective(nn.Module):
    """A model together with the losses it is trained by; what the loop, the optimizers and the card know of it.

    Attributes:
        model: What is trained.
        extra: Tokens of a sequence behind its last position, which are labels only.
        n_losses: How many losses `forward` returns; their sum is optimised.
        settings: What decides the result besides the recipe; a checkpoint of other settings is not resumed.
    """

    model: nn.Module
    extra: int
    n_losses: int
    settings: dict[str, Any]

    def batch(self, streams: TokenStreams, step: int, recipe: Recipe) -> NDArray[np.int64]:
        """Return what `forward` takes at a training step, over all processes.

        These are token ids [sequences, length + extra].
        """
        return batch(
            streams.train, step, sequences=recipe.sequences, length=recipe.length, extra=self.extra, seed=recipe.seed
        )

    def share(self, streams: TokenStreams, step: int, recipe: Recipe) -> NDArray[np.int64]:
        """Return the part of `batch` that falls to this process; of a text that is streamed, what comes next."""
        state = processes()
        if streams.text is not None:
            return streams.text.take(recipe.sequences // state.num_processes, recipe.length, self.extra)
        return np.split(self.batch(streams, step, recipe), state.num_processes)[state.process_index]

    def held_out(self, streams: TokenStreams, recipe: Recipe) -> list[NDArray[np.int64]]:
        """Return what `figures` takes, batch by batch.

        It has at most as many tokens as the recipe allows a validation.
        """
        return validation_batches(
            streams.held_out[: recipe.validation_tokens or None],
            sequences=recipe.micro_batch,
            length=recipe.length,
            extra=self.extra,
        )

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """Return losses [n_losses] of what `batch` makes, or of a part of it."""

    @abstractmethod
    def new_parameters(self) -> set[nn.Parameter]:
        """Return what did not come with the base and takes the heads' learning rate."""

    @abstractmethod
    def embeddings(self) -> set[nn.Parameter]:
        """Return tables of vectors rather than matrices: AdamW without decay, whatever the optimizer."""

    @abstractmethod
    def figures(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Return held-out figures of batches as `held_out` makes them, which may differ between processes.

        Called without gradient, by all processes; what is summed over batches has to be `summed` over them.
        """

    def validate(self, batches: Iterable[NDArray[np.int64]]) -> dict[str, float]:
        """Measure on held-out text; every process reads a part of it, and returns the figures of all.

        Args:
            batches: Of `held_out`.

        Returns:
            Figures by name; early stopping looks at the last one, and lower is better.
        """
        device = next(self.parameters()).device
        state, training = processes(), self.training
        if not isinstance(self, FSDPModule):  # of which every pass is one of all processes
            batches = islice(batches, state.process_index, None, state.num_processes)
        self.eval()
        try:
            with torch.no_grad():
                return self.figures(torch.from_numpy(tokens).to(device) for tokens in batches)
        finally:
            self.train(training)


class HeadsCLM(Objective):
    """Cross-entropy of every head against the labels shifted to its depth; L_T1 + L_T2 + … (DynaMo, Eq. 1).

    Attributes:
        n_heads: Heads of the model, its first predicting the next token.
        freeze_base: Train the further heads alone.
    """

    n_heads: int
    freeze_base: bool

    @property
    @abstractmethod
    def base(self) -> PreTrainedModel:
        """The model whose output makes logits of every head's states."""

    @abstractmethod
    def states(self, tokens: Tensor) -> list[tuple[Tensor, float]]:
        """Return every head's normed state, and the factor on its gradient into the output embedding.

        Args:
            tokens: Ids [batch, length + n_heads], the last n_heads of which only tell a head what is in front of its
                label.

        Returns:
            States [batch, length, hidden].
        """

    @property
    def draft_vocabulary(self) -> Tensor | None:
        """Ids of the words that heads behind the first choose among [words]; None for all."""
        return None

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean negative log-likelihood of every head that is trained, else 0.

        Of a head with a draft vocabulary the mean is over the labels that are in it.

        Args:
            tokens: Ids [batch, length + n_heads]; the last n_heads are labels only.

        Returns:
            Losses [n_heads].
        """
        losses = []
        for depth, (state, gradient_scale) in enumerate(self.states(tokens), start=1):
            if depth == 1 and self.freeze_base:
                losses.append(state.new_zeros(()))
            else:
                losses.append(self._nll(depth, state, tokens, gradient_scale=gradient_scale, reduction="mean"))
        return torch.stack([loss.float() for loss in losses])

    @torch.no_grad()
    def token_log_likelihoods(self, tokens: Tensor) -> Tensor:
        """Return the log p of every head's label, for `tokens` as in `forward`.

        Returns:
            [n_heads, batch, length]; -inf for a label that is not in the head's draft vocabulary.
        """
        states = enumerate(self.states(tokens), start=1)
        return torch.stack([-self._nll(depth, state, tokens).float() for depth, (state, _) in states])

    def _nll(self, depth: int, state: Tensor, tokens: Tensor, **how: Any) -> Tensor:
        """Of the labels of one head, the first being 1; see `label_nll`."""
        labels = tokens[:, depth : depth + state.shape[1]]
        return label_nll(self.base, state, labels, words=self.draft_vocabulary if depth > 1 else None, **how)

    def figures(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """PPL_1 … PPL_n and the joint PPL_1:2 … PPL_1:n (DynaMo, "Evaluation").

        `PPL_n = exp(-(1/T) Σ log p(x_{t+n} | x_{1:t}))`, and with independent heads
        `PPL_1:n = exp(-(1/(nT)) Σ_t Σ_i log p(x_{t+i} | x_{1:t}))`.

        With a draft vocabulary a further head's mean is over the labels that are in it, and their share is
        `coverage`.
        """
        total, count = torch.zeros(2, self.n_heads, dtype=torch.float64)
        for tokens in batches:
            log_likelihoods = self.token_log_likelihoods(tokens).double().cpu()
            known = log_likelihoods != -math.inf
            total += log_likelihoods.where(known, 0.0).sum((1, 2))
            count += known.sum((1, 2))
        total, count = summed(total, count)
        nll = (-total / count).tolist()
        result = {} if self.draft_vocabulary is None else {"coverage": (count[1:].mean() / count[0]).item()}
        result |= {f"ppl_{i + 1}": math.exp(value) for i, value in enumerate(nll)}
        for n in range(2, self.n_heads + 1):
            result[f"ppl_1:{n}"] = math.exp(sum(nll[:n]) / n)
        return result


class NextTokenCLM(HeadsCLM):
    """Cross-entropy of a plain causal language model, which is one head.

    Args:
        model: Any transformers causal LM.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.n_heads = self.extra = self.n_losses = 1
        self.freeze_base = False
        self.settings = {}

    @property
    def base(self) -> PreTrainedModel:
        """See `HeadsCLM`."""
        return self.model

    def states(self, tokens: Tensor) -> list[tuple[Tensor, float]]:
        """See `HeadsCLM`."""
        decoder: Any = self.model.base_model
        return [(decoder(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state, 1.0)]

    def new_parameters(self) -> set[nn.Parameter]:
        """None."""
        return set()

    def embeddings(self) -> set[nn.Parameter]:
        """Return the input and output embedding."""
        return base_embeddings(self.model)


def base_embeddings(base: Any) -> set[nn.Parameter]:
    """Return the input and output embedding of a base; one and the same if they are tied."""
    return {base.get_input_embeddings().weight, base.get_output_embeddings().weight}


class _Embedding(NamedTuple):
    """Rows of an output embedding [words, hidden], and their bias [words]."""

    weight: Tensor
    bias: Tensor | None

    def of(self, words: Tensor) -> _Embedding:
        """Return those of some words."""
        return _Embedding(self.weight[words], None if self.bias is None else self.bias[words])


def label_nll(
    base: PreTrainedModel,
    states: Tensor,
    labels: Tensor,
    *,
    words: Tensor | None = None,
    gradient_scale: float = 1.0,
    reduction: str = "none",
) -> Tensor:
    """-log p of every label under normed states, by the base's own output.

    Chunked: the logits of all positions never exist at once, forward or backward.

    Args:
        base: Whose output embedding it is.
        states: [*labels, hidden].
        labels: Token ids.
        words: Ids that the distribution is over [words], all without; another label has probability 0.
        gradient_scale: Factor on the gradient into the output embedding.
        reduction: `none`, or `mean` over all labels that are among the words.

    Returns:
        Shaped as `labels`, or their mean: 0 if none of them is among the words.
    """
    head: Any = base.get_output_embeddings()
    output = Output.of(base)
    bias = None if head.bias is None else scale_gradient(head.bias, gradient_scale)
    embedding = _Embedding(scale_gradient(head.weight, gradient_scale), bias)
    rows, flat = states.flatten(0, -2), labels.flatten()
    if words is None:
        nll = _row_nll(output, rows, embedding, flat, reduction)
    else:
        nll = _nll_among(words, output, rows, embedding, flat, reduction)
    return nll if reduction == "mean" else nll.view(labels.shape)


def _nll_among(
    words: Tensor, output: Output, rows: Tensor, embedding: _Embedding, labels: Tensor, reduction: str
) -> Tensor:
    """-log p of every label [rows] among some words, infinite if it is none of them, or the mean of the others."""
    places = labels.new_full((len(embedding.weight),), -1)
    places[words] = torch.arange(len(words), device=words.device)
    places = places[labels]
    known = places >= 0
    rows = rows[known]
    if known.any():
        nll = _row_nll(output, rows, embedding.of(words), places[known], reduction)
    else:  # no label, no mean: 0, which has a gradient
        nll = rows.sum() if reduction == "mean" else rows.sum(-1)
    return nll if reduction == "mean" else nll.new_full(labels.shape, math.inf).masked_scatter(known, nll)


def _row_nll(output: Output, rows: Tensor, embedding: _Embedding, labels: Tensor, reduction: str) -> Tensor:
    """-log p of every label [rows], or their mean."""
    if output.softcap:
        nll = _capped_nll(output, rows, embedding, labels)
        return nll.mean() if reduction == "mean" else nll
    weight, bias = embedding
    if output.scale != 1.0:  # s (h W + b) = (s h) W + s b
        rows, bias = rows * output.scale, None if bias is None else bias * output.scale
    return F.linear_cross_entropy(
        rows, weight, labels, linear_bias=bias, reduction=reduction, options=LinearCrossEntropyOptions()
    )


def _capped_nll(output: Output, rows: Tensor, embedding: _Embedding, labels: Tensor) -> Tensor:
    """-log p of every label [rows] of soft-capped logits, which a backward pass computes once more."""

    def nll(some: Tensor, weight: Tensor, bias: Tensor | None, theirs: Tensor) -> Tensor:
        return F.cross_entropy(output(some, weight, bias).float(), theirs, reduction="none")

    weight, bias = embedding
    size = max(1, CAPPED_LOGITS // len(weight))
    pairs = zip(rows.split(size), labels.split(size), strict=True)
    return torch.cat([checkpoint(nll, some, weight, bias, theirs, use_reentrant=False) for some, theirs in pairs])
