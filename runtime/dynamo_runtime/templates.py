"""What chat templates are written for: the environment that transformers renders them in, in a sandbox.

Needs jinja2, and so is imported by nobody before a template is rendered.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from .errors import PromptError

_MOST_CHARACTERS = 16_000_000  # of a text
_MOST_TIMES = 10_000  # that something is repeated or filled up to


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: marks for training what an assistant says. Here a block like any."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 has it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block's body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Bounded(ImmutableSandboxedEnvironment):
    """The sandbox, in which no single expression makes much of little: such numbers stand in no template for chats."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return what an operator gives, unless that is long."""
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator == "**" or (operator == "*" and not _are_numbers(left, right)):
            number = right if isinstance(right, int) else left
            if isinstance(number, int) and abs(number) > _MOST_TIMES:
                raise SecurityError(f"{operator} {number} is too much for a chat template")
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            _check_length(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        """`str.format` of a text that does not ask for wide fields."""
        formatting = super().wrap_str_format(value)
        if formatting is not None:
            _check_format(value.__self__)
        return formatting

    def call(self, context: Context, called: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what a function gives; methods of texts fill up to no great width."""
        if isinstance(getattr(called, "__self__", None), str):
            for number in (*args, *kwargs.values()):
                if isinstance(number, int) and number > _MOST_TIMES:
                    raise SecurityError(f"a width of {number} is too much for a chat template")
        return super().call(context, called, *args, **kwargs)


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _check_format(text: str) -> None:
    """Refuse fields of five digits' width, and widths that come from elsewhere."""
    if re.search(r"\d{5,}|%[^a-zA-Z%]*\*|\{[^{}]*\{", text):
        raise SecurityError(f"{text[:40]!r} makes more of its arguments than a chat template needs")


def _check_length(length: int) -> None:
    if length > _MOST_CHARACTERS:
        raise SecurityError(f"it writes more than {_MOST_CHARACTERS} characters")


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Render a chat template.

    Raises:
        PromptError: It is no template, or does not want these variables.
    """
    try:
        template = _compiled(source)
    except jinja2.TemplateError as error:
        raise PromptError(f"the bundle's chat template is not one: {error}") from error
    parts, length = [], 0
    try:
        for part in template.generate(variables):
            length += len(part)
            _check_length(length)
            parts.append(part)
        return "".join(parts)
    except jinja2.TemplateError as error:
        raise PromptError(f"the chat template refuses these messages: {error}") from error
    except Exception as error:  # whatever a program in a template may do
        raise PromptError(f"the chat template fails on these messages: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = _Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation])
    environment.filters["tojson"] = _to_json
    for name in ("center", "indent"):
        environment.filters[name] = _narrow(environment.filters[name])
    environment.filters["format"] = _format
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(source)


def _narrow(filter: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter of text to whose width there is a limit."""

    def narrow(text: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(number, int) and number > _MOST_TIMES for number in (*args, *kwargs.values())):
            raise SecurityError("a width is too much for a chat template")
        return filter(text, *args, **kwargs)

    return narrow


def _format(text: Any, *args: Any, **kwargs: Any) -> str:
    _check_format(str(text))
    return str(text) % (kwargs or args)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as it is, where jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
