"""What can be said of a text without asking anybody: likelihood, diversity, repetition, and code that parses."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence

import numpy as np

from dynamo_runtime import Engine
from dynamo_runtime.scoring import score_base


def base_nll(plain: Engine, prompt: Sequence[int], output: Sequence[int]) -> float:
    """Return the mean negative log-likelihood in nats of an output's tokens behind its prompt, by the base model.

    As much of the prompt as fits the context is taken.
    """
    tokens = [*prompt, *output][-plain.session.max_length - 1 :]
    nll, _ = score_base(plain.session, tokens, max(0, len(tokens) - len(output) - 1))
    return float(nll.mean())


def distinct_share(tokens: Sequence[int], n: int) -> float:
    """Return the share of different n-grams among a text's n-grams (Li et al. 2016, distinct-n); NaN if it has none."""
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else float("nan")


def parsing_share(prompt: str, output: str) -> float:
    """Return the share of the output's complete lines that lie in the longest prefix of prompt + output that is Python.

    NaN if the output completes no line.
    """
    head = prompt.count("\n")
    lines = (prompt + output).split("\n")[:-1]  # what follows the last line break is no complete line
    if len(lines) == head:
        return float("nan")
    for end in range(len(lines), head, -1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse("\n".join(lines[:end]) + "\n")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return (end - head) / (len(lines) - head)
    return 0.0


def measure(
    plain: Engine, read: Sequence[int], prompt: str, output: str, tokens: Sequence[int], code: bool
) -> dict[str, float | None]:
    """Return every measure of one text; None where a text is too short for one.

    Args:
        plain: The base model, which judges the likelihood.
        read: What stood before it, as tokens.
        prompt: The text that it goes on with; none if it is an answer.
        output: The continuation.
        tokens: Its tokens.
        code: Whether it is Python.
    """
    values = {
        "nll": base_nll(plain, read, tokens) if tokens else float("nan"),
        "distinct_2": distinct_share(tokens, 2),
        "distinct_3": distinct_share(tokens, 3),
        "repetition": 1 - distinct_share(tokens, 4),
    }
    if code:
        values["parsing"] = parsing_share(prompt, output)
    return {name: None if np.isnan(value) else round(value, 6) for name, value in values.items()}
