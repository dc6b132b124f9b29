"""Many texts at once say what each says alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import handmade

from dynamo_runtime import BundleError, Engine, ParameterError, load_bundle
from dynamo_runtime.batch import Batch
from dynamo_runtime.parameters import SamplingParameters
from dynamo_runtime.sampling import draw, truncate

PROMPTS = ["def fib(n):", "x", "class Point:\n    def __init__", "größer, naïve", "for i in range(10):\n"]
NEW = [30, 3, 17, 24, 9]  # tokens that each text gets, so that rows end at different times


class Text:
    """A prompt and what is chosen behind it, as plain decoding chooses."""

    def __init__(self, prompt: Sequence[int], new: int, seed: int, temperature: float):
        self.tokens, self._end = list(prompt), len(prompt) + new
        self.prompt = len(prompt)
        self._rng = np.random.default_rng(seed)
        self._parameters = SamplingParameters(temperature=temperature, top_k=20, top_p=0.9)

    def go_on(self, logits: np.ndarray, ids: np.ndarray) -> bool:
        many = 1 if self._parameters.greedy else len(ids)
        candidates = truncate(logits[:many], ids[:many], self._parameters)
        self.tokens.append(int(candidates.ids[draw(candidates.probabilities, self._rng.random())]))
        return len(self.tokens) < self._end


def texts_of(engine: Engine, temperature: float) -> list[Text]:
    return [Text(engine.encode(p), NEW[i], i, temperature) for i, p in enumerate(PROMPTS)]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_every_row_is_the_engines_text(engine: Engine, rows: int, temperature: float) -> None:
    """Greedily and drawn, whatever else is in the batch: prompts of several lengths, rows that go to the next text."""
    batch = Batch(engine.bundle, rows, 64, threads=1)
    seen = list[int]()
    for _ in range(2):  # the rows' memory is used again
        texts = texts_of(engine, temperature)
        ended = list(batch.write(iter(texts), seen.append))
        assert sorted(map(id, ended)) == sorted(map(id, texts))
        for i, text in enumerate(texts):
            alone = engine.generate(
                PROMPTS[i],
                strategy="autoregressive",
                temperature=temperature,
                top_k=20,
                top_p=0.9,
                repetition_penalty=1.0,
                seed=i,
                max_new_tokens=NEW[i],
                ignore_eos=True,
            )
            assert text.tokens[text.prompt :] == alone.tokens
    read = sum(len(text.tokens) - 1 for text in texts_of(engine, 0.0)) + sum(NEW)
    assert sum(seen) == 2 * read and max(seen) == min(rows, len(PROMPTS)) and batch.passes == len(seen)


def test_ended_rows_are_not_computed(engine: Engine) -> None:
    """Where there is no further text, passes become narrower, until the longest has ended."""
    widths = list[int]()
    list(Batch(engine.bundle, 5, 64, threads=1).write(texts_of(engine, 0.0), widths.append))
    assert widths == sorted(widths, reverse=True) and widths[0] == 5 and widths[-1] == 1


def test_tokens_that_are_given_on_the_way_are_read(engine: Engine) -> None:
    """A text may append several tokens at once: the next choice stands behind all of them."""

    class Given(Text):
        def go_on(self, logits: np.ndarray, ids: np.ndarray) -> bool:
            on = super().go_on(logits, ids)
            self.tokens += [7, 8] if len(self.tokens) == self.prompt + 4 else []
            return on

    prompt = engine.encode(PROMPTS[0])
    (text,) = Batch(engine.bundle, 2, 64, threads=1).write([Given(prompt, 12, 0, 0.0)])
    options: dict[str, Any] = {"strategy": "autoregressive", "temperature": 0.0, "repetition_penalty": 1.0}
    for begin, end in ((len(prompt), len(prompt) + 4), (len(prompt) + 6, len(prompt) + 12)):
        alone = engine.generate(text.tokens[:begin], max_new_tokens=end - begin, ignore_eos=True, **options)
        assert text.tokens[begin:end] == alone.tokens


def test_what_cannot_be_a_batch(plain: Path, tmp_path: Path) -> None:
    """Heads inside the base's graph, and rows and lengths out of range, each in a line."""
    inside = handmade.write_bundle(tmp_path / "inside", 3, graph={"format_version": 3}, format_version=3)
    with pytest.raises(BundleError, match="export it again"):
        Batch(load_bundle(inside), 2, 64)
    bundle = load_bundle(plain)
    for rows, length in ((0, 64), (2, 1), (2, handmade.CONTEXT_LENGTH + 1)):
        with pytest.raises(ParameterError):
            Batch(bundle, rows, length)
