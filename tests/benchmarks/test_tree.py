"""`benchmarks/tree.py`: passes over trees against chains, and its counts of passes against the engine's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tree
from sequoia import chain, parents, replay
from support import chats, handmade
from tree_pass import TreePasses, keep_path, write_tree_graph

from dynamo_runtime import ALL, Engine


def test_a_row_sees_what_stands_in_front_of_it_in_the_tree(tmp_path: Path) -> None:
    """Rows of a tree say what a chain to them says, and go on as it does once they have been moved."""
    shape = [(), (0,), (0, 0), (1,), (1, 0), (1, 0, 0)]
    tokens = [5, 9, 10, 6, 7, 8]
    with Engine(handmade.write_bundle(tmp_path / "bundle", 3), provider="cpu", threads=1) as engine:
        write_tree_graph(engine.bundle.graph_path, tmp_path / "tree.onnx")
        passes, session = TreePasses(engine.session, tmp_path / "tree.onnx"), engine.session
        session.step([1, 2, 3, 4])
        for path in ([0, 1, 2], [0, 3, 4, 5]):
            expected = session.step([tokens[row] for row in path], rows=ALL).logits().copy()
            following = session.step([11]).logits().copy()
            session.cache.rollback(4)
            found = passes.logits(tokens, parents(shape))
            assert found[path] == pytest.approx(expected, abs=1e-4)
            keep_path(session, path)
            session.cache.advance([tokens[row] for row in path])
            assert session.step([11]).logits() == pytest.approx(following, abs=1e-4)
            session.cache.rollback(4)
        blind = passes.logits(tokens, [-1, 0, 1, 2, 3, 4])
        assert np.abs(blind[5] - passes.logits(tokens, parents(shape))[5]).max() > 1e-3


def test_it_counts_the_passes_that_the_engine_takes(tmp_path: Path) -> None:
    bundle = chats.write_bundle(tmp_path / "bundle", "smollm2", 3, context_length=1024)
    with Engine(bundle, provider="cpu", threads=1) as engine:
        for decoding in tree.DECODING:
            answers = tree.answers_of(engine, decoding, ["chat"], 2, 24)
            for seed, answer in enumerate(answers):
                options = tree.DECODING[decoding] | {"strategy": "speculative", "drafter": "parallel"}
                engine.reset()
                written = engine.generate(
                    answer.prompt, max_new_tokens=len(answer.tokens), seed=seed, ignore_eos=True, **options
                )
                assert written.tokens == answer.tokens
                assert replay(chain(2), answer.ranks) == written.statistics.rounds - 1


def test_it_writes_figures_and_needs_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    multi = chats.write_bundle(tmp_path / "multi", "smollm2", 3, context_length=1024).parent
    plain = chats.write_bundle(tmp_path / "plain", "smollm2", 1, context_length=1024).parent
    few = ["--tasks", "chat", "--prompts", "2", "--new-tokens", "12", "--positions", "2", "--seconds", "0"]
    few += ["--threads", "1", "--rows", "4", "--past", "32"]
    out = tmp_path / "tree.json"
    assert tree.main([f"int8={multi}", *few, "--json", str(out)]) == 0
    found = json.loads(out.read_text())["bundles"]["int8"]
    assert found["flips"]["rows"]["chain"]["rows"] > 0
    greedy = found["decodings"]["greedy"]
    assert [len(each["tree"]) for each in greedy["chains"]] == [1, 2, 3]
    assert set(greedy["gains"]) == {"all", "chat"}
    assert tree.main([str(plain), *few]) == 1
    assert "has no heads with a graph of their own" in capsys.readouterr().err
