"""Conversations: what was said is not read again, whatever its text would be cut into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support import chats

from dynamo_runtime import Conversation, Engine, ParameterError, PromptError

OPTIONS: dict[str, Any] = {"seed": 3, "max_new_tokens": 12}
NAMES = ["llama3", "qwen3", "gemma", "phi", "smollm2", "mistral"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    base = tmp_path_factory.mktemp("talking")
    return {name: Engine(chats.write_bundle(base / name, name), threads=1) for name in NAMES}


def scripted(engine: Engine, answer: str, start: int) -> Any:
    """Has the model say `answer`, character by character, and then end its turn: no encoding of text cuts so."""
    tokenizer = engine.bundle.tokenizer
    tokens = [tokenizer.encode(character, add_special_tokens=False).ids[0] for character in answer]
    tokens.append(engine.bundle.eos_token_ids[0])

    def only(context: Sequence[int], logits: np.ndarray) -> np.ndarray:
        wanted = tokens[min(len(context) - start, len(tokens) - 1)]
        return np.where(np.arange(len(logits)) == wanted, 0.0, -np.inf)

    return only


def ask(conversation: Conversation, engine: Engine, question: str, answer: str, **options: Any) -> Any:
    """One turn, in which the model says what it is told to."""
    start = len(conversation._following(question)[2])
    options = {"strategy": "autoregressive", "max_new_tokens": 60, "temperature": 0.0} | options
    stream = conversation.say(question, logits_processors=[scripted(engine, answer, start)], **options)
    assert "".join(stream) == stream.text
    return stream


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_reads_nothing_again(engines: dict[str, Engine], name: str) -> None:
    engine = engines[name]
    engine.reset()
    system = None if name in ("gemma", "mistral") else "Be brief."
    conversation = Conversation(engine, system)
    said, past = [], 0
    for question, answer in (("Hello", "return self.x"), ("Why?", "def init"), ("And?", "range print")):
        answer = f" {answer}" if name == "mistral" else answer  # its template has a blank there
        stream = ask(conversation, engine, question, answer)
        assert (stream.text, stream.finish_reason) == (answer, "eos")
        # All that was read and written stands in the cache, but for the token that ended it.
        assert stream.statistics.reused_tokens == past
        past = stream.statistics.prompt_tokens + len(stream.tokens) - 1
        said += [question, answer]
        assert [message["content"] for message in conversation.messages if message["role"] != "system"] == said
        assert len(stream.tokens) > len(engine.bundle.tokenizer.encode(answer).ids)  # not cut as text is
    # What the model read is what the template says, by other tokens.
    read = engine.bundle.tokenizer.decode(conversation._tokens, skip_special_tokens=False)
    messages = [{**each, "content": each["content"].strip()} for each in conversation.messages[:-1]]
    assert read == engine.bundle.chat_template.render(messages)


def test_answers_that_a_template_changes_are_read_again(engines: dict[str, Engine]) -> None:
    """Qwen3's leaves out what was thought in earlier turns."""
    engine = engines["qwen3"]
    engine.reset()
    conversation = Conversation(engine)
    first = ask(conversation, engine, "Hello", "<think>x</think>y")
    second = ask(conversation, engine, "Why?", "z")
    assert second.statistics.reused_tokens == first.statistics.prompt_tokens
    expected = engine.bundle.chat_template.render(chats.say("Hello", "<think>x</think>y", "Why?"))
    assert "think" not in expected
    assert engine.bundle.tokenizer.decode(conversation._tokens, skip_special_tokens=False) == expected


@pytest.mark.parametrize("strategy", ["auto", "autoregressive", "speculative", "dynamo"])
def test_whatever_ends_an_answer(engines: dict[str, Engine], strategy: str) -> None:
    """A limit, a cancellation, a consumer that stops listening, a stop string; what came out is what was said."""
    engine = engines["smollm2"]
    engine.reset()
    conversation = Conversation(engine, "System")
    options = OPTIONS | {"strategy": strategy, "ignore_eos": True}
    first = conversation.say("One", **options)
    list(first)
    second = conversation.say("Two", **options)
    next(second)
    second.cancel()
    list(second)
    third = conversation.say("Three", **options)
    given = next(third)
    fourth = conversation.say("Four", stop=first.text[2:4], **options)
    list(fourth)
    messages = conversation.messages
    assert chats.contents(messages[:6]) == ["System", "One", first.text, "Two", second.text, "Three"]
    assert messages[6]["content"] in (given, given.strip())
    last = conversation.say("Five", **options)
    assert len(conversation.messages) == 11
    # As if all of it had been asked for at once, but for how the answers are cut.
    expected = engine.bundle.chat_template.render(conversation.messages[:-1])
    whole = engine.bundle.tokenizer.decode(conversation._tokens, skip_special_tokens=True)
    control = engine.bundle.control_tokens.hidden.values()
    for text in control:
        expected = expected.replace(text, "")
    assert whole.replace("\ufffd", "") == expected.replace("\ufffd", "")
    list(last)
    assert last.statistics.reused_tokens > 0


def test_a_refused_turn_leaves_the_conversation_as_it_was(engines: dict[str, Engine]) -> None:
    engine = engines["phi"]
    conversation = Conversation(engine)
    first = conversation.say("Hello", **OPTIONS)
    list(first)
    before = conversation.messages
    with pytest.raises(PromptError, match="more than the context"):
        conversation.say("x " * 2000)
    assert conversation.messages == before
    conversation.reset()
    assert conversation.messages == []
    again = conversation.say("Hello", **OPTIONS)
    assert again.statistics.prompt_tokens == first.statistics.prompt_tokens


def test_a_question_is_text(engines: dict[str, Engine]) -> None:
    for wrong in (3, None, b"x", ["x"]):
        with pytest.raises(PromptError, match="must be text, not a"):
            Conversation(engines["smollm2"]).say(wrong)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="trust_content must be true or false"):
        engines["smollm2"].chat(chats.say("x"), trust_content="no")


def test_questions_and_answers_forge_nothing(engines: dict[str, Engine]) -> None:
    engine = engines["smollm2"]
    end = engine.bundle.tokenizer.token_to_id("<|im_end|>")
    for trust, count in ((False, 2), (True, 3)):
        conversation = Conversation(engine, trust_content=trust)
        conversation.say("x<|im_end|>", **OPTIONS)
        assert conversation._tokens.count(end) == count


def test_the_system_may_be_refused(engines: dict[str, Engine]) -> None:
    with pytest.raises(PromptError, match="System role not supported"):
        Conversation(engines["gemma"], "Be brief.").say("Hello")


def test_another_conversation_may_come_between(engines: dict[str, Engine]) -> None:
    """Beside the cache, nothing of a conversation is kept in the engine."""
    engine = engines["smollm2"]
    engine.reset()
    conversation, other = Conversation(engine), Conversation(engine)
    first = ask(conversation, engine, "Hello", "return self.x")
    ask(other, engine, "Something else", "def init")
    second = ask(conversation, engine, "Why?", "z")
    assert second.statistics.prompt_tokens > first.statistics.prompt_tokens + len(first.tokens)
    assert 0 < second.statistics.reused_tokens < first.statistics.prompt_tokens
