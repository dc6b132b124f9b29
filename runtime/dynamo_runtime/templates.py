"""What chat templates are written for: the environment that transformers renders them in, in a sandbox.

Needs jinja2, and so is imported by nobody before a template is rendered.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import PromptError


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: marks for training what an assistant says. Here a block like any."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 has it)

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Render a chat template.

    Raises:
        PromptError: It is no template, or does not want these variables.
    """
    try:
        template = _compiled(source)
    except jinja2.TemplateError as error:
        raise PromptError(f"the bundle's chat template is not one: {error}") from error
    try:
        return template.render(variables)
    except jinja2.TemplateError as error:
        raise PromptError(f"the chat template refuses these messages: {error}") from error
    except Exception as error:  # whatever a program in a template may do
        raise PromptError(f"the chat template fails on these messages: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
