"""A language model and its drafters as tables, and the exact distribution of what they write."""

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy import stats

from dynamo_runtime.bundle import Bundle
from dynamo_runtime.decoding import decode
from dynamo_runtime.outputs import Outputs
from dynamo_runtime.parameters import SamplingParameters
from dynamo_runtime.sampling import Context
from dynamo_runtime.step import LAST, Last, Rows, Step
from dynamo_runtime.strategies import Speculative

from . import handmade

RANK, CELLS = 3, 5  # CELLS: vocabulary of the tables


class TableModel:
    """A language model and its drafters as tables of the last two tokens; quacks like a session."""

    def __init__(self, kind: str, folder: Path = Path("nowhere"), seed: int = 0):
        rng = np.random.default_rng(seed)
        n = 3
        look_ahead = n - 1 if kind == "lookahead" else 0
        ids = CELLS + look_ahead
        self.base = rng.normal(size=(ids, ids, CELLS)) * 1.2
        near = self.base[:, :, None] * 0.5
        self.heads = near + rng.normal(size=(ids, ids, n, CELLS))  # somewhat like the base, so that drafts pass
        self.factors = near[:, :, None] + rng.normal(size=(ids, ids, n, RANK, CELLS))
        self.gate = np.log(rng.dirichlet(np.ones(RANK), size=(ids, ids)))
        self.bundle = Bundle(
            folder=folder,
            topology=handmade.topology_of(kind, n, RANK),
            vocab_size=CELLS,
            context_length=99,
            kv_layers=9,
            kv_heads=1,
            head_size=1,
            top_k_outputs=CELLS,
        )
        self.max_length = 99
        self.held: list[int] = []
        self.cache = SimpleNamespace(rollback=self.rollback)
        self.rollback(0)

    def rollback(self, length: int) -> None:
        del self.held[length:]
        self.cache.length = length

    def step(self, tokens: list[int], rows: Last = LAST, heads: Rows = LAST) -> Step:
        self.held += tokens
        self.cache.length = len(self.held)
        begin = len(self.held) - len(tokens)
        pairs = [(self.held[i - 1] if i else 0, self.held[i]) for i in range(begin, len(self.held))]
        logits = np.array([self.base[pairs[row]] for row in rows.of(len(tokens))])
        order = np.argsort(-logits, axis=-1, kind="stable")
        topk_logits = np.take_along_axis(logits, order, -1)
        values = Outputs({"logits": logits[None], "topk_logits": topk_logits[None], "topk_ids": order[None]})
        wanted = [pairs[row] for row in heads.of(len(tokens))]
        ahead = partial(TableAhead, self, wanted) if self.bundle.topology.parts else None
        return Step(values, ahead, head_rows=len(wanted))


class TableAhead:
    """What the tables say behind some rows; quacks like `HeadsAhead`."""

    def __init__(self, model: TableModel, pairs: Sequence[tuple[int, int]], rows: Sequence[int]):
        self.pairs = [pairs[row] for row in rows]
        if model.bundle.topology.kind == "parallel":
            found = [model.heads[pair][1:] for pair in self.pairs]
        else:
            found = [model.factors[pair].reshape(-1, CELLS) for pair in self.pairs]
        self.tables, self.gates, self.rows = np.array(found), [model.gate[pair] for pair in self.pairs], len(rows)

    def logits(self, part: int, before: Sequence[int] | None = None) -> np.ndarray:
        return self.tables[:, part]

    def topk(self, part: int, before: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        logits = self.logits(part, before)
        order = np.argsort(-logits, axis=-1, kind="stable")
        return np.take_along_axis(logits, order, -1), order

    def largest(self, part: int, before: Sequence[int] | None = None) -> tuple[list[float], list[int]]:
        logits, ids = self.topk(part, before)
        return logits[0].tolist(), ids[0].tolist()

    def output(self, name: str) -> np.ndarray:
        return np.array(self.gates)


def exact_joint(model: TableModel, prompt: list[int], p: SamplingParameters) -> np.ndarray:
    """Distribution of the next three tokens of plain sampling, [cells, cells, cells], written out densely."""

    def target(context: list[int]) -> np.ndarray:
        logits = model.base[context[-2], context[-1]].copy()
        for token in set(context):
            logits[token] = (
                logits[token] / p.repetition_penalty if logits[token] > 0 else logits[token] * p.repetition_penalty
            )
        probabilities = np.exp(logits / p.temperature)
        order = np.argsort(-probabilities)
        if p.top_k:
            probabilities[order[p.top_k :]] = 0
        probabilities /= probabilities.sum()
        reached = 0.0
        kept = probabilities.copy()
        for token in order:
            if reached >= p.top_p:
                kept[token] = 0
            reached += probabilities[token]
        kept /= kept.sum()
        kept[kept < p.min_p * kept.max()] = 0
        return kept / kept.sum()

    joint = np.zeros((CELLS,) * 3)
    for x1, x2, x3 in itertools.product(range(CELLS), repeat=3):
        first, second, third = (target([*prompt, *before]) for before in ([], [x1], [x1, x2]))
        joint[x1, x2, x3] = first[x1] * second[x2] * third[x3]
    return joint


def p_value(
    kind: str,
    changes: dict,
    counted: Path | None,
    draws: int = 2500,
    make: Any = Speculative,
    prompt: Sequence[int] = (1, 3),
) -> tuple[float, int, int]:
    """Chi-square of the next three tokens, drafted and verified, against the exact joint; and the draft counts.

    `counted` is the folder of n-gram counts for the mask on drafts.
    """
    prompt = list(prompt)
    model = TableModel(kind, *([counted] if counted else []))
    parameters = SamplingParameters(**({"top_k": 0, "temperature": 1.0} | changes))
    strategy = make(model.bundle, parameters)
    rng = np.random.default_rng(7)
    seen = np.zeros((CELLS,) * 3)
    proposed = accepted = 0
    for _ in range(draws):
        model.rollback(0)
        tokens: list[int] = []
        for turn in decode(model, strategy, Context(prompt, CELLS), rng):  # type: ignore[arg-type]
            tokens += turn.tokens
            proposed, accepted = proposed + turn.proposed, accepted + turn.accepted
            if len(tokens) >= 3:
                break
        seen[tuple(tokens[:3])] += 1
    expected = exact_joint(model, prompt, parameters) * draws
    if seen[expected == 0].sum() > 0:
        return 0.0, proposed, accepted  # an impossible text was written
    order = np.argsort(expected, axis=None)[::-1]
    large = order[expected.ravel()[order] >= 5]
    observed, wanted = seen.ravel()[large], expected.ravel()[large]
    rest = draws - wanted.sum()
    if rest > 1e-9:  # cells too rare for the statistic count as one
        observed, wanted = np.append(observed, draws - observed.sum()), np.append(wanted, rest)
    return stats.chisquare(observed, wanted).pvalue, proposed, accepted
