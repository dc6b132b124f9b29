"""A chat template is a program from elsewhere: it makes much of little nowhere, and says what it always said."""

import pytest

from dynamo_runtime.errors import PromptError
from dynamo_runtime.templates import render

HUGE = 10**9
DOUBLING = "{% set n = namespace(x='x' * 1000) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}"
TOO_MUCH = [
    f"{{{{ '%{HUGE}d' % 1 }}}}",
    f"{{{{ '{{:>{HUGE}}}'.format(1) }}}}",
    f"{{{{ '{{:{{w}}}}'.format(1, w={HUGE}) }}}}",
    f"{{{{ '%*d' % ({HUGE}, 1) }}}}",
    f"{{{{ '%{HUGE}d'|format(1) }}}}",
    f"{{{{ 'x' * {HUGE} }}}}",
    f"{{{{ [1] * {HUGE} }}}}",
    f"{{{{ 10 ** {HUGE} }}}}",
    f"{{{{ 'x'.center({HUGE}) }}}}",
    f"{{{{ 'x'.ljust({HUGE}) }}}}",
    f"{{{{ 'x'|center({HUGE}) }}}}",
    f"{{{{ 'x'|indent({HUGE}) }}}}",
    DOUBLING,
    "{% for i in range(9999) %}{% for j in range(9999) %}xxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("template", TOO_MUCH)
def test_much_of_little_is_refused(template: str) -> None:
    with pytest.raises(PromptError, match=r"the chat template refuses these messages"):
        render(template, {})


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ '%05d' % 42 }}", "00042"),
        ("{{ '%s'|format('x') }}", "x"),
        ("{{ '{} {:>5}'.format(100000, 1) }}", "100000     1"),
        ("{{ '-' * 20 }}", "-" * 20),
        ("{{ 2 * 1000000 }}", "2000000"),
        ("{{ 2 ** 10 }}", "1024"),
        ("{{ 3 % 2 }}", "1"),
        ("{{ 'a' + 'b' }}", "ab"),
        ("{{ [1] + [2] }}", "[1, 2]"),
        ("{{ 'x'.center(5) }}", "  x  "),
        ("{{ 'a\nb'|indent(2) }}", "a\n  b"),
    ],
)
def test_all_else_is_as_ever(template: str, text: str) -> None:
    assert render(template, {}) == text
