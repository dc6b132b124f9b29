"""Messages as the model was trained to read them: through the chat template that came with its tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .control import ControlTokens, Encoded
from .errors import BundleError, PromptError
from .files import CONFIG, SPECIAL_TOKENS, TEMPLATE, read_object, read_small
from .text import as_text

_MOST_TEMPLATE_BYTES = 1 << 20
_MOST_CONFIG_BYTES = 16 << 20  # some list every token that was added
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_MARKERS = range(0xF8FF, 0xE000, -1)  # for private use, so that no tokenizer and no template knows them

Message = Mapping[str, Any]
"""As in OpenAI's protocol: `role` and `content`, and whatever else a template reads."""


@dataclass(frozen=True)
class ChatPrompt:
    """Messages as text, and as tokens."""

    text: str
    encoded: Encoded


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Attributes:
        source: In jinja2's language.
        special: Texts of special tokens by the names that templates know them by, as "bos_token".
    """

    source: str
    special: Mapping[str, str]

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final: bool = False
    ) -> str:
        """Return the text that the model is to go on from.

        Args:
            messages: In order.
            add_generation_prompt: Whether it ends with what an answer begins with.
            continue_final: Whether it ends with the content of the last message, which the model then goes on with.

        Raises:
            PromptError: They are no messages, the template does not want them, or there is no jinja2.
        """
        messages = checked(messages)
        if not continue_final:
            return self._render(messages, add_generation_prompt)
        final = messages[-1]
        if not isinstance(final.get("content"), str):
            raise PromptError("the last message has no text to be continued")
        end = _unused([self.source, *_strings(messages)])
        # The blank shows whether the template keeps blanks at the end of a message.
        text = self._render([*messages[:-1], {**final, "content": f"{final['content']}{end} "}], False)
        if end not in text:
            raise PromptError("the chat template leaves out the last message, which was to be continued")
        text, _, rest = text.rpartition(end)
        return text if rest.startswith(" ") else text.rstrip()

    def encode(self, messages: Sequence[Message], control: ControlTokens, *, trust_content: bool = False) -> ChatPrompt:
        """Return the tokens that the model is to answer.

        Control tokens are the template's alone: the text of one inside a message is text.

        Args:
            messages: In order.
            control: The tokenizer's.
            trust_content: Whether messages may hold control tokens.

        Raises:
            PromptError: See `render`; or the tokenizer can write such a text in no other way.
        """
        messages = checked(messages)
        if trust_content:
            text = self._render(messages, True)
            return ChatPrompt(text, control.encode(text))
        marker = _unused([self.source, *_strings(messages)])
        # Roles are the program's own words, which the template compares with its own.
        mark = partial(control.mark, marker=marker)
        marked = [{**_mapped(message, mark), "role": message["role"]} for message in messages]
        parts = self._render(marked, True).split(marker)
        breaks = list(itertools.accumulate(map(len, parts[:-1])))
        text = "".join(parts)
        return ChatPrompt(text, control.encode(text, breaks))

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            from .templates import render
        except ImportError:
            raise PromptError("chat templates need jinja2: pip install 'dynamo-edge[chat]'") from None
        given = {"messages": messages, "tools": None, "documents": None}
        return render(self.source, {**given, "add_generation_prompt": add_generation_prompt, **self.special})


def asked(question: str, system: str | None = None) -> list[Message]:
    """Return a question as messages, behind the system's if there is any."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": as_text(question, "the question")}]


def checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as plain data, without what is None.

    Raises:
        PromptError: They are something else, or there are none.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise PromptError(f"messages are a list of objects with role and content, not a {type(messages).__name__}")
    found = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError("every message is an object with a role and a content")
        kept = {name: value for name, value in message.items() if value is not None}
        found.append(_mapped(kept, _whole))
    if not found:
        raise PromptError("there are no messages")
    return found


def has_template(folder: Path) -> bool:
    """Tell whether a chat template came with a bundle, readable or not.

    Raises:
        BundleError: What would say so is not readable.
    """
    return (folder / TEMPLATE).is_file() or "chat_template" in _object(folder / CONFIG)


def read_template(folder: Path, special: Mapping[str, str]) -> ChatTemplate:
    """Return the chat template in a bundle's folder.

    Args:
        folder: Of the bundle.
        special: Texts of special tokens that its files do not name.

    Raises:
        BundleError: There is none, or its files are not readable.
    """
    config, named = _object(folder / CONFIG), _object(folder / SPECIAL_TOKENS)
    path = folder / TEMPLATE
    try:
        source: Any = read_small(path, _MOST_TEMPLATE_BYTES) if path.is_file() else config.get("chat_template")
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is not readable: {error}") from error
    if isinstance(source, list):  # several, by name
        found = {str(each.get("name")): each.get("template") for each in source if isinstance(each, dict)}
        source = found.get("default")
        if source is None:
            names = ", ".join(sorted(found))[:200]
            raise BundleError(f"{folder / CONFIG} has several chat templates and none called default: {names}")
    if isinstance(source, str) and len(source) > _MOST_TEMPLATE_BYTES:
        raise BundleError(f"{folder / CONFIG} has a chat template of {len(source)} characters, which none ever has")
    if not isinstance(source, str):
        raise BundleError(f"{folder} has no chat template: this model continues texts, and is not one to talk to")
    return ChatTemplate(source, {**special, **_special(named), **_special(config)})


def _special(config: Mapping[str, Any]) -> dict[str, str]:
    """Return texts of special tokens, which may stand there with their options."""
    found = {name: config.get(name) for name in _NAMES}
    texts = {name: each.get("content") if isinstance(each, dict) else each for name, each in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _object(path: Path) -> Mapping[str, Any]:
    """Return a JSON file's object; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return read_object(path, _MOST_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is not readable: {error}") from error


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Plain data with every text in it changed.

    Raises:
        PromptError: It is not plain data: a template is a program from elsewhere, which gets no other objects.
    """
    if isinstance(value, str):
        return change(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): _mapped(each, change) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(each, change) for each in value]
    raise PromptError(f"a message holds a {type(value).__name__}: text, numbers, lists and objects are understood")


def _strings(value: Any) -> list[str]:
    """Return every text in plain data."""
    found: list[str] = []
    _mapped(value, lambda text: found.append(text) or text)  # type: ignore[func-returns-value]
    return found


def _whole(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise PromptError("a message is not valid UTF-8") from None
    return str(text)


def _unused(texts: Iterable[str]) -> str:
    """Return a character that is in none of some texts, so that nobody can have put it there."""
    used = set().union(*texts)
    for code in _MARKERS:
        if chr(code) not in used:
            return chr(code)
    raise PromptError("the messages use every character that is for private use")
