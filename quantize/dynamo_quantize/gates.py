"""What a smaller bundle costs: it is run beside the bundle it came from, and has to stay within limits.

Width: a pass over several tokens must say what as many passes over one token say, or verified decoding is not lossless.
Quality: perplexities and first choices on real text. Acceptance: tokens per pass of the strategies. Size: bytes on
disk, bytes a pass reads, memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from dynamo_graph.read import pass_bytes
from dynamo_runtime import Engine
from dynamo_runtime.bundle import Bundle
from dynamo_runtime.scoring import Scores, score_window
from dynamo_runtime.selection import refusal
from dynamo_runtime.session import Session
from dynamo_runtime.step import ALL, NONE

from .conversations import GREEDY as ANSWERING
from .conversations import SENTENCE_TOKENS, first_sentences
from .memory import peak_memory
from .schemes import GateLimits

RESAMPLES = 2000
ANSWERS = "answers"
GREEDY: dict[str, Any] = {"strategy": "speculative", "temperature": 0.0, "repetition_penalty": 1.0}
STRATEGIES: dict[str, dict[str, Any]] = {"speculative": GREEDY, "dynamo": {"strategy": "dynamo"}}


@dataclass(frozen=True)
class Samples:
    """Real text for the gates, as tokens.

    Attributes:
        name: What text it is.
        texts: For quality.
        widths: For width: shorter, as they are run many times.
        prompts: For acceptance.
        new_tokens: Written behind each prompt.
        starts: Of each of `texts`, the first position that is judged; all of them where there are none.
        questions: Prompts of a chat model, to compare first sentences.
        answers: What the bundle in full precision answers, greedily.
    """

    name: str
    texts: Sequence[Sequence[int]]
    widths: Sequence[Sequence[int]]
    prompts: Sequence[Sequence[int]]
    new_tokens: int
    starts: Sequence[int] = ()
    questions: Sequence[Sequence[int]] = ()
    answers: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Measured:
    """Everything that is measured of one bundle.

    Attributes:
        scores: Of the texts.
        gaps: Largest minus second largest logit where passes over one token stand, one array [positions] a text and
            head.
        flips: Positions by pass width whose first choice is not that of a pass over one token, where the gap of the
            bundle in full precision exceeds the difference; of how many.
        difference: Largest |Δlogit| between passes of different widths.
        tokens_per_pass: By strategy, (new tokens, passes) of every prompt.
        graph_bytes: Graph and weights on disk.
        bundle_bytes: All files.
        pass_bytes: Weights that a pass over one token reads.
        peak_bytes: See `peak_memory`.
        sentences: The first of every answer.
    """

    scores: Scores
    gaps: list[np.ndarray]
    flips: dict[int, int]
    compared: int
    difference: float
    tokens_per_pass: dict[str, list[tuple[int, int]]]
    graph_bytes: int
    bundle_bytes: int
    pass_bytes: int
    peak_bytes: int | None
    sentences: Sequence[str] = ()


@dataclass(frozen=True)
class GateResult:
    """What one figure of a bundle is, and whether its gate lets it pass: a line of the table.

    Attributes:
        gate: "width", "quality", `ANSWERS`, "acceptance" or "size".
        figure: What was measured.
        reference: Of the bundle in full precision; NaN where it has none.
        value: Of the quantized bundle.
        limit: The largest (of tokens per pass: smallest) value allowed, or None where there is no limit.
        passed: Whether it is kept.
    """

    gate: str
    figure: str
    reference: float
    value: float
    limit: float | None = None
    passed: bool = True


def measure(bundle: Bundle, samples: Samples, reference: Measured | None = None) -> Measured:
    """Run a bundle in every way that is judged.

    Args:
        bundle: The bundle.
        samples: What to run it on.
        reference: The bundle in full precision; None if this is it.

    Raises:
        DynamoError: The bundle does not load or run.
    """
    engine = Engine(bundle, provider="cpu")
    session = engine.session
    starts = samples.starts or [0] * len(samples.texts)
    judged = zip(_bar(samples.texts, "quality"), starts, strict=True)
    scores = Scores.join([each.scores for text, start in judged for each in score_window(session, text, first=start)])
    gaps, flips, compared, difference = _widths(session, samples.widths, reference)
    tokens = {
        name: [
            _generate(engine, prompt, samples.new_tokens, seed, options)
            for seed, prompt in enumerate(_bar(samples.prompts, f"acceptance, {name}"))
        ]
        for name, options in STRATEGIES.items()
        if bundle.topology.n_tokens > 1 and refusal(name, bundle) is None
    }
    answers = samples.answers if reference is None else _answers(engine, samples.questions)
    del engine, session
    read = pass_bytes(bundle)
    return Measured(
        scores,
        gaps,
        flips,
        compared,
        difference,
        tokens,
        bundle.graph_bytes,
        sum(record.bytes for record in bundle.files.values()),
        read.plain + read.heads,
        peak_memory(bundle.folder),
        first_sentences(bundle, answers),
    )


def _bar(items: Sequence[Any], what: str) -> Any:
    return tqdm(items, desc=what, leave=False, disable=None)


def _generate(
    engine: Engine, prompt: Sequence[int], new_tokens: int, seed: int, options: dict[str, Any]
) -> tuple[int, int]:
    engine.reset()
    statistics = engine.generate(prompt, max_new_tokens=new_tokens, seed=seed, ignore_eos=True, **options).statistics
    return statistics.new_tokens, statistics.rounds


def _answers(engine: Engine, questions: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return greedy answers, as far as a first sentence goes."""
    return [
        engine.generate(question, max_new_tokens=SENTENCE_TOKENS, **ANSWERING).tokens
        for question in _bar(questions, "answers")
    ]


def _widths(
    session: Session, texts: Sequence[Sequence[int]], reference: Measured | None
) -> tuple[list[np.ndarray], dict[int, int], int, float]:
    """Gaps, flips by width, positions compared and largest difference; see `Measured`."""
    heads = range(1, session.bundle.topology.n_heads + 1)
    widths = range(2, session.bundle.topology.n_tokens + 2)
    flips, compared, worst, gaps = dict.fromkeys(widths, 0), 0, 0.0, []
    for text in _bar(texts, "width"):
        narrow = _in_passes(session, text, 1, heads)
        for head in heads:
            two = np.partition(narrow[head], -2, axis=-1)[:, -2:]
            gaps.append(two[:, 1] - two[:, 0])
        decided = (reference.gaps if reference else gaps)[len(gaps) - len(heads) : len(gaps)]
        for width in widths:
            wide = _in_passes(session, text, width, heads)
            for head, gap in zip(heads, decided, strict=True):
                difference = np.abs(wide[head] - narrow[head]).max(-1)
                changed = wide[head].argmax(-1) != narrow[head].argmax(-1)
                flips[width] += int((changed & (gap > difference)).sum())
                compared += len(gap)
                worst = max(worst, float(difference.max()))
    return gaps, flips, compared, worst


def _in_passes(session: Session, text: Sequence[int], width: int, heads: range) -> dict[int, np.ndarray]:
    """Return logits of every head, from passes over `width` tokens, the cache being theirs too.

    [positions, vocab]; of further heads, of the words that drafts are made of.
    """
    session.cache.reset()
    drafter = session.bundle.drafter
    words = slice(None) if drafter is None or drafter.vocabulary is None else list(drafter.vocabulary)
    found: dict[int, list[np.ndarray]] = {head: [] for head in heads}
    for at in range(0, len(text), width):
        part = text[at : at + width]
        step = session.step(part, rows=ALL, heads=ALL if len(heads) > 1 else NONE)
        for head in heads:
            if head == 1:
                found[head].append(step.logits().copy())
            else:  # behind the end of the text nothing is known, and any token does
                told = [*text, *[0] * head][at + head - 1 :][: len(part)]
                found[head].append(step.ahead().logits(head - 2, told)[:, words].copy())
    return {head: np.concatenate(rows) for head, rows in found.items()}


def judge(full: Measured, small: Measured, limits: GateLimits, lossless: bool) -> list[GateResult]:
    """Compare a bundle with the one it came from.

    Args:
        full: The bundle in full precision.
        small: The quantized one.
        limits: What it may lose.
        lossless: Whether its width must hold.
    """
    rows = [GateResult("width", "max |Δlogit| of passes over 2, 3, … tokens", full.difference, small.difference)]
    for width, count in small.flips.items():
        limit = 0.0 if lossless else None
        kept = limit is None or count <= limit
        figure = f"first choices changed by width {width}"
        rows.append(GateResult("width", figure, full.flips[width], count, limit, kept))
    rows += _quality(full.scores, small.scores, limits.perplexity)
    if full.sentences:
        changed = sum(ours != theirs for ours, theirs in zip(small.sentences, full.sentences, strict=True))
        rows.append(GateResult(ANSWERS, f"first sentences changed, of {len(full.sentences)}", 0, changed))
    rows += _acceptance(full.tokens_per_pass, small.tokens_per_pass, limits.tokens_per_pass)
    for figure, of_full, of_small in (
        ("graph and weights, MB", full.graph_bytes, small.graph_bytes),
        ("all files, MB", full.bundle_bytes, small.bundle_bytes),
        ("weights read a pass, MB", full.pass_bytes, small.pass_bytes),
        ("peak memory, MB", full.peak_bytes, small.peak_bytes),
    ):
        if of_full is not None and of_small is not None:
            rows.append(GateResult("size", figure, of_full / 1e6, of_small / 1e6))
    return rows


def _quality(full: Scores, small: Scores, percent: float) -> list[GateResult]:
    before, after = _perplexities(full, full), _perplexities(small, full)
    rows = []
    for name, value in after.items():
        limit = before[name] * (1 + percent / 100)
        rows.append(GateResult("quality", name.replace("ppl", "PPL"), before[name], value, limit, value <= limit))
    for i, (ours, theirs) in enumerate(zip(small.choices, full.choices, strict=True), 1):
        rows.append(GateResult("quality", f"same first choice, head {i}", 1.0, float((ours == theirs).mean())))
    return rows


def _perplexities(scores: Scores, full: Scores) -> dict[str, float]:
    """As `Scores.perplexities`, but for words that the bundle in full precision drafts none of, as others cannot be."""
    n = len(full.nll)
    found = {}
    for name, row, whole in zip(
        full.perplexities(), [*scores.nll, scores.joint / n], [*full.nll, full.joint], strict=False
    ):
        known = np.isfinite(whole)
        if known.any():
            found[name] = float(np.exp(row[known].mean()))
    return found


def _acceptance(
    full: dict[str, list[tuple[int, int]]], small: dict[str, list[tuple[int, int]]], percent: float
) -> list[GateResult]:
    rows = []
    for name, pairs in small.items():
        ours, theirs = np.array(pairs, float), np.array(full[name], float)
        value, reference = _rate(ours), _rate(theirs)
        limit = reference * (1 - percent / 100)
        draws = np.random.default_rng(0).integers(0, len(ours), (RESAMPLES, len(ours)))
        ratios = [_rate(ours[draw]) / _rate(theirs[draw]) for draw in draws]
        certainly_worse = float(np.quantile(ratios, 0.975)) < 1 - percent / 100
        rows.append(GateResult("acceptance", f"tokens per pass, {name}", reference, value, limit, not certainly_worse))
    return rows


def _rate(pairs: np.ndarray) -> float:
    return float(pairs[:, 0].sum() / pairs[:, 1].sum())


def summary(rows: list[GateResult]) -> str:
    """Return what a bundle lost, in a few words."""
    said = []
    for row in rows:
        if row.figure == "PPL_1":
            said.append(f"PPL_1 {row.value / row.reference - 1:+.2%}")
        elif row.gate == ANSWERS:
            figure, _, count = row.figure.partition(", of ")
            said.append(f"{row.value:.0f} of {count} {figure}")
    return ", ".join(said)


def table(rows: list[GateResult], text: str) -> str:
    """Return the table as text; `text` is what it was measured on."""
    lines = [
        f"measured on {text}",
        f"{'gate':<12}{'figure':<46}{'fp32':>10}{'quantized':>12}{'change':>9}{'limit':>10}",
    ]
    for row in rows:
        change = row.value / row.reference - 1 if row.reference and not math.isnan(row.reference) else math.nan
        shown = "" if math.isnan(change) or row.gate == "width" else f"{change:+.2%}"
        limit = "" if row.limit is None else _number(row.limit)
        mark = "" if row.passed else "  FAILED"
        lines.append(
            f"{row.gate:<12}{row.figure:<46}{_number(row.reference):>10}{_number(row.value):>12}{shown:>9}{limit:>10}{mark}"
        )
    return "\n".join(lines)


def _number(value: float) -> str:
    if math.isfinite(value) and value == int(value):
        return str(int(value))
    return f"{value:.1e}" if abs(value) < 1e-2 else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def as_json(rows: list[GateResult], samples: Samples) -> dict[str, Any]:
    """Return the table for the manifest."""
    return {
        "passed": all(row.passed for row in rows),
        "text": samples.name,
        "scored_tokens": sum(len(text) for text in samples.texts) - sum(samples.starts),
        "width_tokens": sum(len(text) for text in samples.widths),
        "prompts": len(samples.prompts),
        "new_tokens": samples.new_tokens,
        "rows": [asdict(row) for row in rows],
    }
