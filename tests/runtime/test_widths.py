"""The width test: what it finds on made-up devices and on one whose kernel is wrong for one row, and what follows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import profiles

from dynamo_runtime import Engine
from dynamo_runtime.cli.run import _warn
from dynamo_runtime.device.records import Widths
from dynamo_runtime.errors import ParameterError
from dynamo_runtime.profiling.report import caveats, summary
from dynamo_runtime.profiling.widths import STRETCH, WIDEST, measure_widths
from dynamo_runtime.session import Session
from dynamo_runtime.topology import Plain

TEXT = [3, 1, 4, 1, 5, 9, 2, 6]
SOUND, WRONG = Widths(8, [64], 112, 0, 1e-5, 30.0), Widths(8, [64], 112, 3, 0.4, 30.0)


class MadeUp:
    """A session whose logits are a function of the text so far, put out of order by some widths.

    Attributes:
        fault: What is added to the logits of a pass, by its tokens.
    """

    def __init__(self, fault: dict[int, np.ndarray], length: int = 100):
        self.fault, self.max_length, self.heads = fault, length, None
        self.bundle = SimpleNamespace(topology=Plain())
        self.tokens: list[int] = []
        self.cache = SimpleNamespace(length=0, rollback=self.rollback, reset=lambda: self.rollback(0))

    def rollback(self, length: int) -> None:
        del self.tokens[length:]
        self.cache.length = length

    def step(self, tokens: Sequence[int], **_: Any) -> SimpleNamespace:
        rows = []
        for token in tokens:
            self.tokens.append(token)
            rows.append(np.random.default_rng(self.tokens).normal(size=10))
        self.cache.length = len(self.tokens)
        return SimpleNamespace(logits=lambda: np.array(rows) + self.fault.get(len(tokens), np.zeros(10)))


def expected(past: int) -> np.ndarray:
    """Logits of the stretch behind so many positions."""
    text = [TEXT[at % len(TEXT)] for at in range(past + STRETCH)]
    return np.array([np.random.default_rng(text[: at + 1]).normal(size=10) for at in range(past, past + STRETCH)])


def test_what_is_compared() -> None:
    """Passes over three tokens are off, and no others: of 16 positions behind each past all but the last."""
    off = np.zeros(10)
    off[7] = 1.0
    found = measure_widths(MadeUp({3: off}), TEXT, [40, 9], 0.0)  # type: ignore[arg-type]
    right = np.array([expected(9), expected(40)])
    wide = right.copy()
    wide[:, :15] += off
    changed = int((wide.argmax(-1) != right.argmax(-1)).sum())
    assert changed
    assert found == Widths(WIDEST, [9, 40], 2 * STRETCH * 7, changed, pytest.approx(1.0), np.abs(right).max())


@pytest.mark.parametrize(
    ("fault", "exact", "holds"),
    [
        (0.0, True, True),
        (1e-7, False, True),  # another order of adding
        (0.05, False, False),  # activations rounded otherwise
        (np.nan, False, False),
    ],
)
def test_the_verdict(fault: float, exact: bool, holds: bool) -> None:
    """A kernel that is off for single rows alone: every wider pass differs from it."""
    session = MadeUp({1: np.linspace(0, fault, 10)} if fault else {})
    found = measure_widths(session, TEXT, [9], 0.0)  # type: ignore[arg-type]
    assert (found.exact, found.holds) == (exact, holds)


def test_a_kernel_that_is_wrong_for_one_row(multi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(multi, threads=1)
    assert measure_widths(engine.session, TEXT, [16, 40], 0.0).holds
    assert engine.session.cache.length == 0
    step = Session.step

    def wrong(session: Session, tokens: Sequence[int], **options: Any) -> Any:
        found = step(session, tokens, **options)
        if len(tokens) == 1:
            right = found.logits()
            monkeypatch.setattr(found, "logits", lambda: right * 0.54)
        return found

    monkeypatch.setattr(Session, "step", wrong)
    assert not measure_widths(engine.session, TEXT, [16], 0.0).holds


def test_nothing_is_drafted_where_it_fails(multi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passes = [replace(each, time=profiles.quantiles(1.0)) for each in profiles.full().passes if not each.heads]
    free = profiles.apart(passes=passes, drafting=0.0, overhead=0.0, acceptance=[])  # rows cost nothing: drafts pay
    engine, options = Engine(multi, threads=1), {"max_new_tokens": 20, "seed": 1, "ignore_eos": True}
    texts = {}
    for name, widths in (("untested", None), ("sound", SOUND), ("wrong", WRONG)):
        engine.reset()
        engine.profile = replace(free, widths=widths)
        found = engine.generate("def f(x):", **options)  # type: ignore[arg-type]
        texts[name] = found.tokens
        assert engine.lossless == (name != "wrong")
        assert (found.statistics.strategy == "auto") == engine.lossless
        assert bool(found.statistics.draft_tokens_proposed) == engine.lossless
        for strategy in ("auto", "speculative", "dynamo", "autoregressive"):
            _warn(engine, strategy)
            said = capsys.readouterr().err
            assert said.count("on this device a pass depends on how many tokens") == (
                name == "wrong" and strategy in ("auto", "speculative")
            )
            assert said.count("\n") <= 1
    assert texts["untested"] == texts["sound"] == texts["wrong"]
    with pytest.raises(ParameterError, match="auto cannot draft on this bundle, so draft_tokens would do nothing"):
        engine.stream("x", draft_tokens=1)
    assert engine.generate("x", strategy="speculative", max_new_tokens=3).statistics.strategy == "speculative"


def test_the_report_says_so() -> None:
    assert "the same bit for bit in passes over 1 to 8 tokens (224 rows)" in summary(profiles.full())
    assert not caveats(profiles.full(widths=SOUND))
    assert "1.0e-05 (largest 30), which is rounding" in summary(profiles.full(widths=SOUND))
    assert caveats(profiles.full(widths=WRONG))[0].startswith("PASSES DEPEND ON THEIR WIDTH")
    assert "3 first choices of 112" in summary(profiles.full(widths=WRONG))
