"""Perplexities in windows, and the dynamic one, against torch and the dense version of Algorithm 1."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import dense_dynamo as dense
from support import handmade

from dynamo_evaluate import perplexity_tables as tables
from dynamo_evaluate.perplexity import Scoring, Window, score_document, window_size, windows
from dynamo_evaluate.results import Results
from dynamo_evaluate.shapes import OPTIONAL, fits
from dynamo_export.source import load_model
from dynamo_runtime import Engine
from dynamo_runtime.errors import ParameterError
from dynamo_runtime.scoring import score_window
from dynamo_runtime.session import Session

TOKENS = np.random.default_rng(5).integers(1, 320, 70).tolist()
SIZE, STRIDE = 24, 10
TOLERANCE = 1e-4


def test_windows_by_hand() -> None:
    found = list(windows(11, 4, 2))
    assert found == [Window(0, 0, 4), Window(2, 4, 6), Window(4, 6, 8), Window(6, 8, 10), Window(8, 10, 11)]
    assert list(windows(4, 4, 2)) == [Window(0, 0, 4)]


@pytest.mark.parametrize(("length", "size", "stride"), [(50, 7, 3), (50, 7, 7), (6, 9, 1), (23, 5, 5)])
def test_windows_score_every_position_once(length: int, size: int, stride: int) -> None:
    found = list(windows(length, size, stride))
    assert [t for window in found for t in range(window.first, window.end)] == list(range(length))
    for window in found:
        assert window.end - window.begin <= size
        assert window.begin == 0 or window.first - window.begin >= size - stride


@pytest.fixture(scope="module")
def logits(pair: Any) -> dict[int, np.ndarray]:
    """Torch's logits of every head by position, [3, vocab], each from a pass over its own window."""
    _, model = load_model(pair.checkpoint, None)
    assert model is not None
    found: dict[int, np.ndarray] = {}
    for window in windows(len(TOKENS) - 3, SIZE, STRIDE):
        with torch.inference_mode():
            rows = model(torch.tensor([TOKENS[window.begin : window.end]]))
        stacked = np.stack([head[0].float().numpy() for head in rows])
        for t in range(window.first, window.end):
            found[t] = stacked[:, t - window.begin]
    return found


def nll(logits: np.ndarray, target: int) -> float:
    row = logits.astype(np.float64)
    return float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[target])


def test_equals_torch_in_windows(logits: dict[int, np.ndarray], engines: tuple[Engine, Engine]) -> None:
    found = score_document(engines[0].session, TOKENS, Scoring(SIZE, STRIDE))
    assert found["positions"] == len(TOKENS) - 3
    for head in range(3):
        torchs = sum(nll(rows[head], TOKENS[t + 1 + head]) for t, rows in logits.items())
        assert math.exp(found["nll"][head] / 67) == pytest.approx(math.exp(torchs / 67), rel=TOLERANCE)
    joint = sum(nll(rows[head], TOKENS[t + 1 + head]) for t, rows in logits.items() for head in range(3))
    assert math.exp(found["joint"] / (3 * 67)) == pytest.approx(math.exp(joint / (3 * 67)), rel=TOLERANCE)


@pytest.mark.parametrize("first_token", ["joint", "base"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_dynamic_perplexity_equals_a_dense_walk_on_torch(
    pair: Any, logits: dict[int, np.ndarray], engines: tuple[Engine, Engine], alpha: float, first_token: str
) -> None:
    """The text is walked with n from the dense Alg. 1 on torch's logits; the likelihood is the unmasked product."""
    sampling = {"temperature": 1.3, "top_k": 8, "cooccurrence_weight": alpha, "first_token": first_token}
    counts = dense.Counts.from_npz(pair.checkpoint / "cooccurrence.npz")
    begins = {t: w.begin for w in windows(len(TOKENS) - 3, SIZE, STRIDE) for t in range(w.first, w.end)}
    thresholds = [0.0, 0.05, 0.3, 1.0] if alpha else [0.05, 0.3, 1.0]
    scoring = Scoring(SIZE, STRIDE, thresholds=thresholds, sampling=sampling)
    found = score_document(engines[0].session, TOKENS, scoring)["dynamic"]
    lengths = set()
    for epsilon in thresholds:
        options = dense.Options(k=8, temperature=1.3, epsilon_b=epsilon, alpha_c=alpha)
        t, passes, total = 0, 0, 0.0
        while t in logits:
            heads = [dense.head_distribution(row, options) for row in logits[t]]
            if first_token == "base":
                heads[0] = np.array([TOKENS[t + 1]]), np.ones(1)
            context = set(TOKENS[begins[t] : t + 1])
            n = 3 if epsilon < 1 else 1
            while n > 1 and dense.joint(heads[:n], context, options, counts if alpha else None) is None:
                n -= 1
            total += sum(nll(logits[t][head], TOKENS[t + 1 + head]) for head in range(n))
            passes, t = passes + 1, t + n
            lengths.add(n)
        ours = found[f"{epsilon:g}"]
        assert (ours["passes"], ours["tokens"]) == (passes, t)
        assert math.exp(ours["nll"] / t) == pytest.approx(math.exp(total / t), rel=TOLERANCE)
    assert len(lengths) > 1


def test_one_token_a_pass_is_perplexity_of_the_first_head(engines: tuple[Engine, Engine]) -> None:
    found = score_document(engines[0].session, TOKENS, Scoring(SIZE, STRIDE, thresholds=[1.0]))
    assert found["dynamic"]["1"]["tokens"] == found["positions"]
    assert found["dynamic"]["1"]["nll"] == pytest.approx(found["nll"][0])


def test_plain_bundle_has_one_perplexity(engines: tuple[Engine, Engine]) -> None:
    multi = score_document(engines[0].session, TOKENS, Scoring(SIZE, STRIDE))
    plain = score_document(engines[1].session, TOKENS, Scoring(SIZE, STRIDE, ahead=3, thresholds=[0.5]))
    assert plain["positions"] == multi["positions"] and plain["dynamic"] == {}
    assert plain["nll"] == pytest.approx(multi["nll"][:1], rel=1e-5)


def test_window_must_fit(engines: tuple[Engine, Engine]) -> None:
    session = engines[0].session
    assert window_size(session, None, None) == (96, 48)
    assert window_size(session, 10, None) == (10, 5)
    for size, stride in ((97, None), (0, None), (10, 11), (10, 0)):
        with pytest.raises(Exception, match=r"window|stride"):
            window_size(session, size, stride)


def test_parameters_are_checked(engines: tuple[Engine, Engine]) -> None:
    with pytest.raises(ParameterError, match="top_k"):
        score_document(engines[0].session, TOKENS, Scoring(9, 9, thresholds=[0.5], sampling={"top_k": 0}))


def results_of(path: Path | None, *bundles: str, scale: float = 1.0) -> Results:
    """Two documents: 4 positions with nll 4 and 8 ahead, 6 positions with 12 and 6."""
    described = [{"name": name, "kind": "parallel", "precision": "fp32"} for name in bundles]
    machine = {"processor": "a machine", "provider": "cpu", "onnxruntime": "1", "python": "3"}
    header = {"command": "perplexity", "bundles": described, "machine": machine, "texts": ["t"], "documents": 2}
    results = Results.start(path, header | {"window": 8, "stride": 4})
    for number in range(len(bundles)):
        for name, positions, first, second in (("a", 4, 4.0, 8.0), ("b", 6, 12.0, 6.0)):
            factor = scale**number
            dynamic = {"0.5": {"passes": 3, "tokens": positions, "nll": first * factor}}
            record = {"positions": positions, "nll": [first * factor, second], "joint": first * factor + second}
            results.append({"kind": "document", "bundle": number, "document": name, **record, "dynamic": dynamic})
    return results


def test_figures_by_hand() -> None:
    """PPL_1 = exp(16/10), PPL_2 = exp(14/10), PPL_1:2 = exp(30/20); 10 tokens in 6 passes."""
    results = results_of(None, "one")
    (found,) = tables.figures(results)
    values = {name: float(np.exp(log.value)) for name, log in found.log_perplexities.items()}
    assert values == pytest.approx({"PPL_1": math.exp(1.6), "PPL_2": math.exp(1.4), "PPL_1:2": math.exp(1.5)})
    log, speed = found.dynamic["0.5"]
    assert math.exp(log.value) == pytest.approx(math.exp(1.6)) and speed.value == pytest.approx(10 / 6)
    interval = tables.perplexity(found.log_perplexities["PPL_1"])
    assert interval.low == pytest.approx(math.exp(1.0)) and interval.high == pytest.approx(math.exp(2.0))
    assert tables.as_json(results, [found])["perplexities"][0]["PPL_1"]["value"] == pytest.approx(4.953, abs=1e-3)


def test_words_that_are_not_covered_are_in_no_sum(tmp_path: Path) -> None:
    """Sums over windows are those of the finite numbers; tables say how many there are."""
    words, thresholds = [7, 2, 9, 4, 11, 1, 5, 3], [0.0, 0.2]
    bundle = handmade.small_bundle(tmp_path / "b", "parallel", 3, vocab=12, vocabulary=words, conditioned=True)
    session, tokens = Session(bundle, provider="cpu", threads=1), [token % 12 for token in TOKENS]
    sampling = {"cooccurrence_weight": 0.0, "top_k": 8}
    found = score_document(session, tokens, Scoring(SIZE, STRIDE, thresholds=thresholds, sampling=sampling))
    nll = np.zeros((3, len(tokens) - 3))
    for window in windows(len(tokens) - 3, SIZE, STRIDE):
        for stretch in score_window(session, tokens, window.begin, window.first, window.end):
            nll[:, stretch.positions.start : stretch.positions.stop] = stretch.scores.nll
    runs = np.cumsum(nll, 0)
    covered = found["covered"]
    assert covered["tokens"] == np.isfinite(nll).sum(1).tolist() and covered["tokens"][0] == found["positions"] == 67
    assert covered["runs"] == np.isfinite(runs).sum(1).tolist() and covered["joint"] == covered["runs"][2] < 67
    assert found["nll"] == pytest.approx([row[np.isfinite(row)].sum() for row in nll])
    assert covered["runs_nll"] == pytest.approx([row[np.isfinite(row)].sum() for row in runs])
    assert found["joint"] == pytest.approx(covered["runs_nll"][2])
    walk = found["dynamic"]["0"]
    assert 0 < covered["dynamic"]["0"] < walk["tokens"] and math.isfinite(walk["nll"])
    record = {"kind": "document", "bundle": 0, "document": "a", **found}
    results = results_of(None, "one")
    results.records[:] = [record]
    (figures,) = tables.figures(results)
    assert figures.coverage == pytest.approx([np.isfinite(row).mean() for row in nll])
    logs = {name: log.value for name, log in figures.log_perplexities.items()}
    assert logs["PPL_2"] == pytest.approx(nll[1][np.isfinite(nll[1])].mean())
    assert logs["PPL_1:2"] == pytest.approx(runs[1][np.isfinite(runs[1])].mean() / 2)
    assert logs["PPL_1:3"] == pytest.approx(runs[2][np.isfinite(runs[2])].mean() / 3)
    assert figures.dynamic["0"][0].value == pytest.approx(walk["nll"] / covered["dynamic"]["0"])
    shown = "\n".join(table.text() for table in tables.tables([figures]))
    assert "in the draft vocabulary" in shown and f"{figures.coverage[1]:.1%}" in shown
    shape = OPTIONAL["document"]["covered"]
    assert fits(covered, shape) and not fits({**covered, "tokens": "all"}, shape)


def test_bundles_side_by_side() -> None:
    found = tables.figures(results_of(None, "one", "two", scale=1.1))
    ratio = tables.change(found[1].log_perplexities["PPL_1"], found[0].log_perplexities["PPL_1"])
    assert ratio.value == pytest.approx(math.exp(0.16))
    text = "\n".join(table.text() for table in tables.tables(found))
    assert "one: PPL_d" in text and "two: PPL_d" in text and "1.1735" in text


def test_no_ratio_of_other_positions() -> None:
    results = results_of(None, "one", "two")
    results.records[-1]["positions"] = 5  # as of a look-ahead bundle
    (table, _) = tables.tables(tables.figures(results))
    assert table.rows[0][-1] == "1.0000 [1.0000, 1.0000]" and table.rows[1][-1] == "–"
    assert [row[1] for row in table.rows] == ["10", "9"]


def test_only_documents_that_all_bundles_have_count() -> None:
    results = results_of(None, "one", "two")
    del results.records[-1]
    assert tables.figures(results)[0].documents == ["a"]
