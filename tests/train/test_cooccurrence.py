"""N-gram counts against a dictionary of tuples."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dynamo_train import TrainingError
from dynamo_train.cooccurrence import count_ngrams

VOCAB, END = 7, 0


def naive(tokens: list[int], order: int) -> Counter:
    grams = (tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))
    return Counter(gram for gram in grams if END not in gram[:-1])


def unpack(path: Path, order: int) -> dict[tuple[int, ...], int]:
    """All n-grams of one order in a saved trie, by walking it from the root."""
    with np.load(path) as data:
        grams = [(token,) for token in range(VOCAB)]
        counts = data["counts_1"]
        for level in range(2, order + 1):
            offsets, ids = data[f"offsets_{level}"], data[f"ids_{level}"]
            assert len(offsets) == len(grams) + 1
            grams = [
                (*gram, int(token))
                for node, gram in enumerate(grams)
                for token in ids[offsets[node] : offsets[node + 1]]
            ]
            counts = data[f"counts_{level}"]
        return dict(zip(grams, counts.tolist(), strict=True))


@pytest.mark.parametrize("chunk", [16, 1 << 23])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_counts_are_exact(order: int, chunk: int, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, VOCAB, 500).astype(np.uint16)
    counts = count_ngrams(tokens, order, vocab_size=VOCAB, end_id=END, min_counts=[1] * order, chunk_tokens=chunk)
    counts.save(tmp_path / "counts.npz")
    for k in range(2, order + 1):
        expected = naive(tokens.tolist(), k)
        assert unpack(tmp_path / "counts.npz", k) == expected
        assert counts.totals[k - 1] == expected.total()


def test_the_rule_of_what_is_kept(tmp_path: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, VOCAB, 500).astype(np.uint16)
    counts = count_ngrams(tokens, 3, vocab_size=VOCAB, end_id=END, min_counts=[1, 9, 10])
    counts.save(tmp_path / "counts.npz")
    pairs = {gram: c for gram, c in naive(tokens.tolist(), 2).items() if c >= 9}
    triples = naive(tokens.tolist(), 3)
    kept = {gram: c for gram, c in triples.items() if c >= 10 and gram[:2] in pairs}
    assert 0 < len(pairs) < VOCAB**2
    assert unpack(tmp_path / "counts.npz", 2) == pairs
    assert unpack(tmp_path / "counts.npz", 3) == kept
    assert counts.totals[2] == triples.total()  # what was dropped still counts


def test_min_counts_must_fit() -> None:
    tokens = np.zeros(9, dtype=np.uint16)
    for min_counts in ([1, 2], [1, 3, 2]):
        with pytest.raises(TrainingError, match="minimal counts"):
            count_ngrams(tokens, 3, vocab_size=VOCAB, end_id=None, min_counts=min_counts)
