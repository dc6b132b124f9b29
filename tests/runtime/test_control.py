"""Control tokens: stop strings that have one in them, texts that show them, and prompts in which they are only text."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import handmade
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dynamo_runtime import BundleError, Candidates, Engine, Generation, ParameterError, PromptError
from dynamo_runtime.control import ControlTokens
from dynamo_runtime.drafting import Ask
from dynamo_runtime.text import StopStrings

PROMPT = "def fib(n):\n"
CONTROL = [f"<|{name}|>" for name in ("end", "user", "tool", "call", "pad", "fin")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with three heads and six special tokens that the prompt does not need."""
    folder = tmp_path_factory.mktemp("control") / "bundle"
    return handmade.write_bundle(folder, 3, tokenizer=handmade.train_tokenizer(CONTROL))


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return Engine(bundle, threads=1)


def often(bundle: Any) -> Callable[[Sequence[int], np.ndarray], np.ndarray]:
    """Makes special tokens likely, and halves of characters impossible."""
    decode = bundle.tokenizer.decode
    broken = [token for token in range(bundle.vocab_size) if not decode([token], skip_special_tokens=False).isascii()]
    chosen = [bundle.tokenizer.token_to_id(text) for text in CONTROL]

    def favour(context: Sequence[int], logits: np.ndarray) -> np.ndarray:
        logits[chosen] += 6
        logits[broken] = -np.inf
        return logits

    return favour


class Knows:
    """A drafter that guesses what it was told, wherever in the text it is."""

    ask, depth = Ask(), 2

    def __init__(self, start: int, tokens: Sequence[int]):
        self._start, self._tokens = start, tokens

    def guess(self, passed):
        place = len(passed.context.tokens) + len(passed.final) - self._start

        def certain(chosen):
            following = np.array(self._tokens[place + len(chosen) - 1 :][:1], np.int64)
            return Candidates(following, np.ones(len(following)))

        return certain


WAYS: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "autoregressive, greedy": {"temperature": 0},
    "auto": {},
    "auto, greedy": {"temperature": 0},
    "speculative": {},
    "speculative, greedy": {"temperature": 0},
    "dynamo": {"backoff_threshold": 0.0, "cooccurrence_weight": 0.0, "top_k": 8},
    "dynamo, greedy": {"backoff_threshold": 0.0, "cooccurrence_weight": 0.0, "top_k": 8, "temperature": 0},
}


def run(engine: Engine, way: str, **more: Any) -> Generation:
    """Thirty tokens, many of them special; of `speculative` all drafts are right."""
    options = {"seed": 11, "max_new_tokens": 30, "ignore_eos": True, "logits_processors": [often(engine.bundle)]}
    options |= WAYS[way] | {"strategy": way.split(",")[0]}
    engine.reset()
    if options["strategy"] == "speculative":
        plain = engine.generate(PROMPT, **options | {"strategy": "autoregressive"})
        options |= {"drafter": Knows(len(engine.encode(PROMPT)), plain.tokens), "draft_cooccurrence_weight": 0.0}
        engine.reset()
    return engine.generate(PROMPT, **options | more)


def shown(engine: Engine, tokens: Sequence[int]) -> str:
    text: str = engine.bundle.tokenizer.decode(list(tokens))
    return text


@pytest.mark.parametrize("way", WAYS)
def test_a_stop_string_with_a_special_token_in_it_ends_the_text_in_front_of_it(engine: Engine, way: str) -> None:
    """Alone, between others, and with text on either side; wherever it stands in a step."""
    whole = run(engine, way)
    hidden, tokenizer = engine.bundle.control_tokens.hidden, engine.bundle.tokenizer
    special = [place for place, token in enumerate(whole.tokens) if token in hidden]
    assert len(special) > 3 and "<|" not in whole.text
    several = way.startswith(("speculative", "dynamo"))
    assert not several or max(whole.statistics.steps) == 3
    everything = tokenizer.decode(whole.tokens, skip_special_tokens=False)
    middles = 0
    for place in special:
        for before, behind in ((0, 1), (2, 1), (0, 3), (1, 2)):
            part = whole.tokens[max(0, place - before) : place + behind]
            stop = tokenizer.decode(part, skip_special_tokens=False)
            in_front = tokenizer.decode(whole.tokens[: max(0, place - before)], skip_special_tokens=False)
            if everything.find(stop) != len(in_front):
                continue  # it stands earlier too
            found = run(engine, way, stop=[stop, "never there"])
            assert found.finish_reason == "stop", stop
            assert found.text == shown(engine, whole.tokens[: max(0, place - before)])
            open_ = run(engine, way, stop=stop, show_special=True)
            assert open_.finish_reason == "stop"
            assert open_.text == everything[: everything.find(stop)]
            middles += several and len(found.tokens) % 3 != 1
    assert middles or not several


def test_special_tokens_are_shown_on_request(engine: Engine) -> None:
    hidden, open_ = run(engine, "autoregressive"), run(engine, "autoregressive", show_special=True)
    assert hidden.tokens == open_.tokens
    assert hidden.text == shown(engine, hidden.tokens)
    assert open_.text == engine.bundle.tokenizer.decode(open_.tokens, skip_special_tokens=False) != hidden.text


def test_a_stop_string_may_end_with_the_token_that_ends_the_text(bundle: Path, engine: Engine) -> None:
    whole = run(engine, "autoregressive")
    hidden = engine.bundle.control_tokens.hidden
    place = max(whole.tokens.index(token) for token in hidden if token in whole.tokens)  # not in front of that
    ending = Engine(replace(engine.bundle, eos_token_ids=(whole.tokens[place],)), threads=1)
    stop = engine.bundle.tokenizer.decode(whole.tokens[place - 1 : place + 1], skip_special_tokens=False)
    for more, length in (({}, place), ({"stop": stop}, place - 1), ({"stop": hidden[whole.tokens[place]]}, place)):
        found = run(ending, "autoregressive", ignore_eos=False, **more)
        assert found.finish_reason == "eos"
        assert found.text == shown(engine, whole.tokens[:length])
        found = run(ending, "autoregressive", ignore_eos=False, show_special=True, **more)
        expected = engine.bundle.tokenizer.decode(whole.tokens[:length], skip_special_tokens=False)
        assert found.text == expected  # never the token that ended it


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=3),
    st.lists(st.sampled_from(["a", "b", "<>", "ab", "<", ">"]), max_size=14),
    st.booleans(),
)
def test_stops_among_hidden_texts_do_not_depend_on_the_pieces(stops: list[str], parts: list[str], split: bool) -> None:
    """`<>` is hidden: stops with it are looked for in everything, others in what is shown."""
    pieces = [(piece, part != "<>") for part in parts for piece in (part if split and part != "<>" else [part])]
    matcher = StopStrings(stops, ["<>"])
    out = "".join(matcher.push(text, shown=visible) for text, visible in pieces) + matcher.flush()
    characters = [(character, visible) for text, visible in pieces for character in text]
    best = None
    for end in range(len(characters) + 1):
        for stop in stops:
            seen = [i for i in range(end) if "<>" in stop or characters[i][1]]
            if end and end - 1 in seen and "".join(characters[i][0] for i in seen).endswith(stop):
                start = seen[-len(stop)]
                best = min(best, (end, start)) if best and best[0] == end else best or (end, start)
        if best:
            break
    # A hidden text arrives whole, so it may complete a stop string with all of its characters at once.
    expected = [c for i, (c, visible) in enumerate(characters) if visible and (best is None or i < best[1])]
    assert matcher.stopped == (best is not None)
    assert out == "".join(expected)


# What a prompt says.


def sentencepiece() -> Tokenizer:
    """Like Llama 2's and Gemma's: special tokens in the vocabulary proper, a ▁ put in front of every piece."""
    pieces = ["<unk>", "<s>", "</s>", "<turn>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "a", "b", "▁a"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<turn>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def numbered_behind() -> Tokenizer:
    """Special tokens behind the vocabulary, an ordinary added token between them, and blanks that belong to one."""
    tokenizer = handmade.train_tokenizer(["<|im_start|>"], ["<think>"])
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True, lstrip=True, rstrip=True), "<turn>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


@pytest.mark.parametrize("make", [sentencepiece, numbered_behind])
def test_what_only_looks_like_a_control_token_is_text(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    control = ControlTokens(tokenizer)
    texts = list(control.texts.values())
    for text in ["", "a b", "é 日", *texts, *(f"a {one}{two} b" for one, two in itertools.product(texts, repeat=2))]:
        assert control.encode(text).ids == tokenizer.encode(text, add_special_tokens=False).ids
        found = control.encode_literally(text)
        added = [1] if make is sentencepiece else []
        assert found[: len(added)] == added
        assert not set(found[len(added) :]) & set(control.texts)
        assert tokenizer.decode(found).strip() == text.strip()
    for one, two in itertools.product(texts, repeat=2):
        text = f"b {one} a{two}\n"
        found = control.encode(text, [text.index(two, text.index(one) + 1) + 2])
        assert [token for token in found.ids if token in control.texts] == [tokenizer.token_to_id(one)]
        assert two in tokenizer.decode(found.ids)
        # Cut as without it: what stands in front of the text that only looks like one has the tokens it always has.
        genuine = found.ids.index(tokenizer.token_to_id(one))
        assert found.ids[: genuine + 1] == tokenizer.encode(text, add_special_tokens=False).ids[: genuine + 1]
        assert all(0 <= start <= end <= len(text) for start, end in found.spans)


def test_texts_that_cannot_be_told_apart_are_refused() -> None:
    """A vocabulary that text is cut into may itself hold the text of a control token."""
    pieces = ["<unk>", "<s>", "a", "<", "s", ">"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.add_special_tokens(["<s>"])
    with pytest.raises(PromptError, match="cannot write <s> as text"):
        ControlTokens(tokenizer).encode_literally("a<s>")
    assert ControlTokens(tokenizer).encode_literally("a<s") == [2, 3, 4]


def test_a_plain_prompt_has_no_control_tokens(engine: Engine) -> None:
    prompt = "x <|end|><|user|> y"
    control = engine.bundle.control_tokens
    assert len([token for token in engine.encode(prompt) if token in control.texts]) == 2
    plain = engine.encode(prompt, plain_prompt=True)
    assert not set(plain) & set(control.texts)
    assert engine.bundle.tokenizer.decode(plain) == prompt
    options = {"max_new_tokens": 1, "seed": 1}
    assert engine.generate(prompt, plain_prompt=True, **options).statistics.prompt_tokens == len(plain)
    assert engine.encode("no such thing", plain_prompt=True) == engine.encode("no such thing")
    with pytest.raises(ParameterError, match="plain_prompt is about text"):
        engine.generate(plain, plain_prompt=True)


def test_tokens_that_end_a_text_are_control_tokens_too() -> None:
    tokenizer = handmade.train_tokenizer(added=["<end>"])
    end = tokenizer.token_to_id("<end>")
    assert "<end>" in ControlTokens(tokenizer, [end]).texts.values()
    assert end not in ControlTokens(tokenizer, [end]).hidden
    assert end not in ControlTokens(tokenizer, [end]).encode_literally("a<end>")
    assert end in ControlTokens(tokenizer).encode_literally("a<end>")
    assert json.loads(tokenizer.to_str())["added_tokens"][-1]["special"] is False


def test_control_tokens_of_a_length_that_none_have(tmp_path: Path) -> None:
    """All that they begin and end with is looked for in messages, which is the square of their length."""
    graph = handmade.write_bundle(tmp_path / "bundle", 1, tokenizer=handmade.train_tokenizer(["<" + "x" * 100_000]))
    with pytest.raises(BundleError, match="special tokens of a length that no tokenizer's have"):
        Engine(graph, threads=1).generate("def", max_new_tokens=2)
