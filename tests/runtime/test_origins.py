"""Where the tokens of a text come from: as the engine counts it, on a terminal, and as a page."""

import html
import io
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support import chats

from dynamo_runtime import Engine, Generation, Origin, Span
from dynamo_runtime.cli import drafts, run
from dynamo_runtime.origins import OWN, Attribution

PROMPT = "def fib(n):\n    return fib(n - 1) + fib(n - 2)\n\ndef fib(n):\n    return fib(n - 1) +"
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
WAYS: list[dict[str, Any]] = [
    {"strategy": "autoregressive"},
    {"strategy": "dynamo", "backoff_threshold": 0.0},
    {"strategy": "speculative", "drafter": "both"},
]
DYNAMO: dict[str, Any] = {"strategy": "dynamo", "backoff_threshold": 0.0, "seed": 3, "max_new_tokens": 12}
FLAGS = ["--strategy", "dynamo", "--backoff-threshold", "0", "--seed", "3", "--max-new-tokens", "12", "--threads", "1"]


def write(engine: Engine, **options: Any) -> Generation:
    engine.reset()
    return engine.generate(PROMPT, **{"origins": True} | options)


def check_counts(found: Generation) -> None:
    """Origins against what the engine counts for itself."""
    statistics, drafted = found.statistics, [origin for origin in found.origins if origin != OWN]
    assert len(found.origins) == len(found.tokens) == statistics.new_tokens
    assert len(drafted) == statistics.draft_tokens_accepted
    depths = Counter(origin.depth for origin in drafted)
    assert [depths[depth + 1] for depth in range(len(statistics.accepted_at_depth))] == statistics.accepted_at_depth
    assert Counter(origin.source for origin in drafted if origin.source) == +statistics.accepted_by


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_origins_are_what_the_engine_counts(engine: Engine, way: dict[str, Any]) -> None:
    found = write(engine, max_new_tokens=50, **GREEDY, **way)
    check_counts(found)
    assert "".join(span.text for span in found.spans) == found.text
    assert any(origin.depth for origin in found.origins) == (way["strategy"] in ("dynamo", "speculative"))
    untraced = write(engine, max_new_tokens=50, origins=False, **GREEDY, **way)
    assert untraced.text == found.text and untraced.origins == untraced.spans == []


@pytest.mark.parametrize("way", WAYS[1:], ids=lambda way: "-".join(map(str, way.values())))
def test_a_text_may_end_inside_a_round(engine: Engine, way: dict[str, Any]) -> None:
    whole = write(engine, max_new_tokens=24, **GREEDY, **way)
    for limit in (2, 3, 7, 12):
        found = write(engine, max_new_tokens=limit, **GREEDY, **way)
        check_counts(found)
        assert found.origins == whole.origins[:limit]
    for begin in (1, 8, len(whole.text) // 2):
        found = write(engine, max_new_tokens=24, stop=whole.text[begin : begin + 3], **GREEDY, **way)
        assert "".join(span.text for span in found.spans) == found.text == whole.text[: len(found.text)]
        check_counts(found)


def test_rounds_are_drafts_and_then_a_token_of_the_pass(engine: Engine) -> None:
    found = write(engine, max_new_tokens=50, **GREEDY, **WAYS[-1])
    rounds, depth = Counter[int](), 0
    for origin in found.origins:
        if origin.depth:
            depth += 1
            assert origin.depth == depth and origin.source in ("parallel", "lookup")
        else:
            rounds[depth + 1] += 1
            depth = 0
    assert rounds + Counter({depth: 1} if depth else {}) == found.statistics.steps


def test_held_text_is_given_out_to_its_tokens() -> None:
    attribution, origins = Attribution(), [OWN, Origin(1, "lookup"), Origin(2, "lookup"), OWN]
    for text, origin in zip(("ab", "", "cde", "f"), origins, strict=True):
        attribution.origins.append(origin)
        attribution.hold(text)
    for length in (1, 3, 0, 1):
        attribution.give_out(length)
    assert attribution.spans == [Span("a", OWN), Span("b", OWN), Span("cd", origins[2]), Span("e", origins[2])]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_on_a_terminal(multi: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, screen)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    expected = write(engine, **DYNAMO)
    arguments = [str(multi), PROMPT, "--show-drafts", *FLAGS]
    assert run.main(arguments) == 0
    text, _, rest = screen.getvalue().partition("\ndynamo: ")
    assert re.sub(r"\x1b\[[\d;]*m", "", text).replace("↵", "") == drafts.visible(expected.text)
    numbers = re.findall(r"\x1b\[38;5;16;48;5;(\d+)m", text)
    used = {str(drafts.kind_of(origin).ground[0]) for origin in expected.origins if origin.depth}  # type: ignore[index]
    assert set(numbers) == used and len(used) > 1
    legend = rest.splitlines()[1]
    for kind in drafts.KINDS:
        assert re.search(rf"{kind.label}(\x1b\[0m)? {drafts.counts(expected.origins)[kind]}\b", legend)
    screen.truncate(0)
    monkeypatch.setenv("NO_COLOR", "1")
    assert run.main(arguments) == 0
    assert "\x1b" not in screen.getvalue() and "[1|" in screen.getvalue()


def test_brackets_where_there_are_no_colours(multi: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    expected = write(engine, **DYNAMO)
    assert run.main(["--show-drafts", str(multi), PROMPT, *FLAGS]) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(map(drafts.bracketed, expected.spans))
    assert captured.err.splitlines()[-1] == drafts.legend(expected.origins, colours=False)


def test_looks_of_single_spans() -> None:
    assert drafts.bracketed(Span("x", OWN)) == "x"
    assert drafts.bracketed(Span("x", Origin(7, "cp"))) == "[7|x]"
    assert drafts.bracketed(Span(" \x1b[2J", Origin(2, "lookup"))) == "[L2| \\x1b[2J]"
    assert drafts.coloured(Span("a\n\nb\u202e", Origin(1))).split("\n") == [
        "\x1b[38;5;16;48;5;194ma↵\x1b[0m", "\x1b[38;5;16;48;5;194m↵\x1b[0m", "\x1b[38;5;16;48;5;194mb\\u202e\x1b[0m"
    ]  # fmt: skip
    assert drafts.visible("\ta\u3000b\r\x00") == "\ta\u3000b\\r\\x00"


class Reader(HTMLParser):
    """Texts of a page by the class of the innermost element, and every element's name."""

    def __init__(self, page: str):
        super().__init__()
        self.texts: list[tuple[str, str]] = []
        self.names: list[str] = []
        self._classes: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        if tag not in ("meta", "hr", "html"):
            self._classes.append(dict(attributes).get("class") or tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "html":
            self._classes.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append((self._classes[-1] if self._classes else "", data))


def test_a_page(multi: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "page.html"
    prompt = PROMPT + " # <script>alert(1)</script> & \x1b[2J"
    engine.reset()
    expected = engine.generate(prompt, origins=True, **DYNAMO)
    assert run.main([str(multi), prompt, "--show-drafts", str(page), *FLAGS]) == 0
    assert capsys.readouterr().out == expected.text
    written = page.read_text(encoding="utf-8")
    read = Reader(written)
    shown = [(name, text) for name, text in read.texts if name in ("prompt", "pre") or re.fullmatch(r"k\d", name)]
    end = next(index for index, (name, text) in enumerate(shown) if text == drafts.KINDS[0].label)
    assert shown[0] == ("prompt", drafts.visible(prompt))
    assert "".join(text for _, text in shown[1:end]).replace("↵", "") == drafts.visible(expected.text)
    drafted = sum(name != "pre" for name, _ in shown[1:end])
    assert drafted == sum(span.origin.depth > 0 for span in expected.spans) > 0
    assert "script" not in read.names and "\x1b" not in written
    assert not re.search(r"(src|href)=|url\(|@import", written)
    assert html.escape(expected.statistics.line()).split(", first token")[0] in written


def test_a_conversation_on_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    bundle, page = chats.write_bundle(tmp_path / "bundle", "smollm2"), tmp_path / "page.html"
    stdin = io.TextIOWrapper(io.BytesIO(b"Hello\nAnd <you>?\n"))
    for looks in ([str(page)], []):
        stdin.seek(0)
        monkeypatch.setattr(sys, "stdin", stdin)
        flags = ["--seed", "3", "--threads", "1", "--max-new-tokens", "12", "--show-drafts", *looks]
        assert run.main(["-m", str(bundle), *flags, "--chat"]) == 0
        legends = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tokens: ")]
        assert len(legends) == (0 if looks else 2)
    prompts = [text for name, text in Reader(page.read_text(encoding="utf-8")).texts if name == "prompt"]
    assert prompts == ["> Hello\n", "> And <you>?\n"]


def test_pages_that_cannot_be_written(multi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    for value, message in (
        (tmp_path / "page.txt", "to a file whose name ends in .html"),
        (tmp_path / "folder.html", "it is a folder"),
        (tmp_path / "file" / "page.html", "cannot write"),
    ):
        assert run.main([str(multi), PROMPT, f"--show-drafts={value}", *FLAGS]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1


def test_what_follows_the_flag_is_a_prompt_unless_it_is_a_page() -> None:
    assert drafts.given([]) == []
    for order in (["--show-drafts", "x", "y"], ["x", "y", "--show-drafts"]):
        args = run.build_parser().parse_args(drafts.given(order))
        assert (args.show_drafts, args.bundle, args.prompt) == ("", "x", "y")
    args = run.build_parser().parse_args(drafts.given(["--show-drafts", "p.html", "x"]))
    assert (args.show_drafts, args.bundle) == ("p.html", "x")
