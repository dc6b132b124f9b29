"""Training further heads on what a frozen base said of a text: distillation without the base in the loop.

The base's distribution at the position that a head predicts is what the head is to say: with the token drafted in front
being the text's own, head i at position t learns from the base's distribution at t + i - 1.  A label is one draw of
it; the distribution itself has less noise (Zhou et al. 2024, DistillSpec, arXiv 2310.08461).  What is behind the
likeliest tokens that are kept is left out, which makes heads a little too sure of themselves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dynamo_model import MultiTokenModel
from dynamo_model.output import Output
from dynamo_model.parallel import Penultimate

from .objective import Objective, base_embeddings
from .recipe import Recipe
from .spread import summed
from .states import Said, StateCache, rows_at_once
from .tokens import TokenStreams, window_numbers

LOSSES = ("kl", "ce")


class CachedHeads(Objective):
    """Losses of further heads on cached states; the base's own head is frozen and has none.

    Args:
        model: Base and heads; nothing of the base is run but its final norm and output embedding.
        train: States of the training text.
        held_out: States of the held-out text.
        loss: `kl`, to the base's distribution, or `ce`, cross-entropy of the label (DynaMo, Eq. 1).
    """

    model: MultiTokenModel
    _places: Tensor

    def __init__(self, model: MultiTokenModel, train: StateCache, held_out: StateCache, loss: str) -> None:
        super().__init__()
        self.model, self._train, self._held_out, self._loss = model, train, held_out, loss
        self.extra, self.n_losses = 1, model.n_heads - 1
        words = model.draft_vocabulary
        self.settings = {"cached": True, "loss": loss} | ({} if words is None else {"draft_vocabulary": len(words)})
        self.settings |= {"conditioned": True} if model.conditioned else {}
        model.base.requires_grad_(False)
        vocab_size = len(model.output_embedding.weight)
        places = torch.arange(vocab_size) if words is None else torch.full((vocab_size,), -1)
        if words is not None:
            places[words.cpu()] = torch.arange(len(words))
        self.register_buffer("_places", places.to(model.base.device), persistent=False)
        self._given: dict[tuple[int, int], Penultimate] = {}
        self._weights: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    @property
    def rows(self) -> int:
        """Positions whose logits exist at once, on the device that this is on by now."""
        words = self.model.draft_vocabulary
        return rows_at_once(self._places.device, len(self._places if words is None else words))

    def batch(self, streams: TokenStreams, step: int, recipe: Recipe) -> NDArray[np.int64]:
        """Numbers of the windows of a training step [sequences]."""
        return window_numbers(self._train.windows, step, recipe.sequences, recipe.seed)

    def held_out(self, streams: TokenStreams, recipe: Recipe) -> list[NDArray[np.int64]]:
        """Numbers of the held-out windows, in batches."""
        windows = np.arange(self._held_out.windows)
        return [windows[i : i + recipe.micro_batch] for i in range(0, len(windows), recipe.micro_batch)]

    def forward(self, windows: Tensor) -> Tensor:
        """Mean loss of every further head over the positions of some training windows [n_heads - 1].

        Args:
            windows: Their numbers.
        """
        said = self._train.read(windows.cpu().numpy())
        losses = []
        for head, state in enumerate(self._states(said), start=2):
            state = state[:, : said.stem.shape[1] - head + 1]  # behind them the base has not read what is predicted
            ids, p = self._targets(said, head)
            losses.append(_Distil.apply(state.flatten(0, 1), self, ids.flatten(0, 1), p.flatten(0, 1)))
        return torch.stack(losses)

    def figures(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Return how far the heads foresee, and their perplexities.

        Every position of the text is taken as one at which drafting starts.  A draft is the head's first choice, told
        the text so far.  It is judged twice: by the text that follows, which is how often it is accepted where the
        text is written as this one was, and by the base's first choice, which is greedy decoding.

        Returns:
            `accepted_i`: share of positions at which drafts 1 … i all are the text; `tokens_a_pass`, one more
            than their sum; `greedy_i`, the share of drafts that are the base's first choice where the drafts before
            it were and the text went on with them; `greedy_tokens_a_pass` of their products; `coverage`,
            `ppl_1` … `ppl_n`, `ppl_1:n` as for the other objectives.
        """
        n = self.model.n_heads
        hits, chances, greedy_hits, greedy_chances = torch.zeros(4, n - 1, dtype=torch.float64)
        nll, count = torch.zeros(2, n, dtype=torch.float64)
        for windows in batches:
            said = self._held_out.read(windows.cpu().numpy())
            nll[0] -= said.label_log_p.double().sum()
            count[0] += said.label_log_p.numel()
            length = said.stem.shape[1] - n + 1
            chain = greedy_chain = torch.ones(len(windows), length, dtype=torch.bool)
            for head, state in enumerate(self._states(said), start=2):
                labels = said.tokens[:, head : head + length]
                choices, log_p = self._read(state[:, :length].flatten(0, 1), labels.flatten())
                known = log_p != -math.inf
                nll[head - 1] -= log_p.where(known, 0.0).double().sum()
                count[head - 1] += known.sum()
                choices = choices.view(labels.shape)
                best = said.ids[:, head - 1 : head - 1 + length, 0]
                greedy_chances[head - 2] += greedy_chain.sum()
                greedy_chain = greedy_chain & (choices == best)
                greedy_hits[head - 2] += greedy_chain.sum()
                greedy_chain = greedy_chain & (choices == labels)
                chain = chain & (choices == labels)
                hits[head - 2] += chain.sum()
                chances[head - 2] += chain.numel()
        hits, chances, greedy_hits, greedy_chances, nll, count = summed(
            hits, chances, greedy_hits, greedy_chances, nll, count
        )
        accepted, greedy = (hits / chances).tolist(), (greedy_hits / greedy_chances.clamp(min=1)).tolist()
        result = {f"accepted_{i}": share for i, share in enumerate(accepted, start=1)}
        result["tokens_a_pass"] = 1 + sum(accepted)
        result |= {f"greedy_{i}": share for i, share in enumerate(greedy, start=1)}
        result["greedy_tokens_a_pass"] = 1 + float(np.cumprod(greedy).sum())
        if self.model.draft_vocabulary is not None:
            result["coverage"] = (count[1:] / chances).mean().item()
        means = (nll / count.clamp(min=1)).tolist()
        result |= {f"ppl_{i}": math.exp(mean) for i, mean in enumerate(means, start=1)}
        return result | {f"ppl_1:{i}": math.exp(sum(means[:i]) / i) for i in range(2, n + 1)}

    def new_parameters(self) -> set[nn.Parameter]:
        """Return the further heads' layers and conditions."""
        return {*self.model.heads.parameters(), *self.model.conditions.parameters()}

    def embeddings(self) -> set[nn.Parameter]:
        """Input and output embedding of the base."""
        return base_embeddings(self.model.base)

    def logits(self, states: Tensor) -> Tensor:
        """Of further heads, float32 [rows, words]; the frozen output embedding is cut and cast once, not every time."""
        device, embedding = self.model.base.device.type, self.model.output_embedding
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embedding.weight.dtype
        if dtype not in self._weights:
            words = slice(None) if self.model.draft_vocabulary is None else self.model.draft_vocabulary
            bias = None if embedding.bias is None else embedding.bias[words].to(dtype)
            self._weights[dtype] = embedding.weight[words].detach().to(dtype), bias
        return Output.of(self.model.base)(states, *self._weights[dtype]).float()

    def _states(self, said: Said) -> Iterable[Tensor]:
        """State of every further head [windows, length, hidden], told the token in front."""
        batch, length = said.stem.shape[:2]
        device = self.model.base.device
        if (batch, length) not in self._given:  # masks and rotary factors, once for every shape
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                _, given = self.model.penultimate(said.tokens[:, :-1].to(device))
            self._given[batch, length] = dataclasses.replace(given, stem=given.stem[:0])
        stem = said.stem.to(device)
        if not torch.is_autocast_enabled(device.type):
            stem = stem.to(self.model.output_embedding.weight.dtype)
        given = dataclasses.replace(self._given[batch, length], stem=stem)
        for head, state in enumerate(self.model.further_states(given), start=2):
            previous = said.tokens[:, head - 1 :].to(device)
            yield self.model.condition(head, state[:, : previous.shape[1]], previous)

    def _targets(self, said: Said, head: int) -> tuple[Tensor, Tensor]:
        """Return what a head is to say: words by their place in its vocabulary, -1 for none, and their probabilities.

        Returns:
            Places [windows, length - head + 1, k] and probabilities alike, 0 where there is no place.
        """
        if self._loss == "ce":
            ids = said.tokens[:, head:, None]
            p = torch.ones(ids.shape)
        else:
            ids, p = said.ids[:, head - 1 :], said.log_p[:, head - 1 :].exp()
        places = self._places[ids.to(self._places.device)]
        return places, p.to(places.device) * (places >= 0)

    def _read(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """First choices, and the labels' log-probabilities, -inf outside of the draft vocabulary [rows]."""
        words, places = self.model.draft_vocabulary, self._places[labels.to(self._places.device)]
        choices, log_p = [], []
        for some, theirs in zip(states.split(self.rows), places.split(self.rows), strict=True):
            logits = self.logits(some)
            choices.append(logits.argmax(-1))
            label = logits.gather(-1, theirs.clamp(min=0)[:, None])[:, 0] - logits.logsumexp(-1)
            log_p.append(label.masked_fill(theirs < 0, -math.inf))
        chosen = torch.cat(choices)
        return (chosen if words is None else words[chosen]).cpu(), torch.cat(log_p).cpu()


class _Distil(torch.autograd.Function):
    """Mean over rows of `-Σ_k p_k log q_k`, q a softmax over a frozen output embedding.

    The gradient of the states is made on the way forward, chunk by chunk: the logits of all rows never exist at once,
    and no product is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, heads: CachedHeads, places: Tensor, p: Tensor) -> Tensor:
        total, gradients = states.new_zeros((), dtype=torch.float32), []
        chunks = zip(*(each.split(heads.rows) for each in (states, places, p)), strict=True)
        for some, theirs, weights in chunks:
            with torch.enable_grad():
                rows = some.detach().requires_grad_()
                logits = heads.logits(rows)
            values, theirs = logits.detach(), theirs.clamp(min=0)  # where there is no word there is no weight
            mass = values.logsumexp(-1, keepdim=True)
            total -= (weights * (values.gather(-1, theirs) - mass)).sum()
            slope = (values - mass).exp_().mul_(weights.sum(-1, keepdim=True)).scatter_add_(-1, theirs, -weights)
            gradients += torch.autograd.grad(logits, rows, slope)
        ctx.save_for_backward(torch.cat(gradients) / len(states))
        return total / len(states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None
