"""The picture at the top of README: a text in which every token's colour says how it came.

    python benchmarks/picture.py --bundle BUNDLE [--prompt ID]  # decode it anew, then draw it
    python benchmarks/picture.py [--check]                      # draw it from the results file, or check the picture

A prompt of `benchmarks/prompts` is answered greedily by strategy `auto`, planned by the profile that `dynamo-profile`
has kept of the bundle, or else by rules of thumb.  What came of it is `benchmarks/results/picture.json`, and the
picture is `docs/images/drafts.svg`.  The colours are those of `dynamo-run --show-drafts`.  With --check nothing is
written, and the exit status is 1 if the picture is not what would be drawn.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import textwrap
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from machine import describe_machine
from page import write_or_check

from dynamo_runtime import Engine
from dynamo_runtime.chat import asked
from dynamo_runtime.cli.drafts import KINDS, counts, kind_of, visible
from dynamo_runtime.errors import DynamoError
from dynamo_runtime.files import write_whole
from dynamo_runtime.origins import Origin, Span
from dynamo_runtime.providers import import_onnxruntime

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ROOT / "benchmarks/prompts"
RESULTS, PICTURE = ROOT / "benchmarks/results/picture.json", ROOT / "docs/images/drafts.svg"
GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0}
COLUMNS = 96  # characters of a line
CHARACTER, LINE, MARGIN = 8.4, 22, 14  # width of a character of 14 pixels, height of a line, margin, in pixels


def prompt_of(name: str) -> str:
    """Return a prompt by its id, such as `edit-18`."""
    file = PROMPTS / f"{name.partition('-')[0]}.jsonl"
    rows = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = [str(row["prompt"]) for row in map(json.loads, rows) if row["id"] == name]
    if not found:
        sys.exit(f"picture: error: there is no prompt {name} in {PROMPTS}")
    return found[0]


def decode(bundle: str, name: str, new_tokens: int) -> dict[str, Any]:
    """Answer a prompt, and say how every token of the answer came."""
    prompt = prompt_of(name)
    with Engine(bundle) as engine:
        tokens = engine.bundle.chat_template.encode(asked(prompt, None), engine.bundle.control_tokens).encoded.ids
        found = engine.generate(tokens, max_new_tokens=new_tokens, origins=True, **GREEDY)
        planned = "no profile" if engine.profile is None else "a profile of this device"
    about = f"{describe_machine()}; onnxruntime {import_onnxruntime().__version__}, Python {platform.python_version()}"
    return {
        "prompt": name,
        "machine": about,
        "planned_by": planned,
        "new_tokens": found.statistics.new_tokens,
        "passes": found.statistics.rounds,
        "origins": [list(origin) for origin in found.origins],
        "spans": [[text, *origin] for text, origin in found.spans],
    }


def wrapped(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Lines of at most COLUMNS characters, broken between tokens, in front of a word where there is one."""
    line: list[Span] = []
    for text, origin in spans:
        for number, part in enumerate(text.split("\n")):
            if number:
                yield line
                line = []
            if line and part[:1].isspace() and sum(len(each.text) for each in line) + len(part) > COLUMNS - 4:
                yield line
                line, part = [], part.lstrip()
            if part:
                line.append(Span(part, origin))
    yield line


def row(line: Sequence[Span], top: float, colour: str = "#111") -> list[str]:
    """Return one line of the picture: a ground behind every draft, and the text on it."""
    shapes, words, column = [], [], 0
    for text, origin in line:
        left, width = MARGIN + column * CHARACTER, len(text) * CHARACTER
        if ground := kind_of(origin).ground:
            shapes.append(
                f'<rect x="{left + 0.5:.1f}" y="{top - 15:g}" width="{width - 1:.1f}" height="19" rx="3" '
                f'fill="{ground[1]}"/>'
            )
        words.append(
            f'<text x="{left:.1f}" y="{top:g}" textLength="{width:.1f}" fill="{colour}">{escape(visible(text))}</text>'
        )
        column += len(text)
    return shapes + words


def legend(origins: Sequence[Origin], top: float) -> list[str]:
    """Return what the colours mean, of those that there are."""
    found, shapes, left = counts(origins), [], float(MARGIN)
    for kind in KINDS:
        if not found[kind]:
            continue
        label = f"{kind.label}: {found[kind]}"
        width = len(label) * 7.2
        fill, stroke = (kind.ground[1], "none") if kind.ground else ("#fff", "#999")
        shapes.append(f'<rect x="{left:g}" y="{top - 12:g}" width="14" height="14" rx="3" fill="{fill}" '
                      f'stroke="{stroke}"/>')  # fmt: skip
        shapes.append(
            f'<text x="{left + 20:g}" y="{top:g}" font-size="12" textLength="{width:.1f}" fill="#333">{label}</text>'
        )
        left += width + 44
    return shapes


def drawn(found: dict[str, Any]) -> str:
    """Return the picture, as SVG."""
    spans = [Span(text, Origin(depth, source)) for text, depth, source in found["spans"]]
    asked_lines = [line for part in prompt_of(found["prompt"]).split("\n") for line in textwrap.wrap(part, COLUMNS)]
    shapes: list[str] = []
    top = MARGIN + 14.0
    for line in asked_lines:
        shapes += row([Span(line, Origin())], top, "#777")
        top += LINE
    top += LINE / 2
    for spans_of_line in wrapped(spans):
        shapes += row(spans_of_line, top)
        top += LINE
    top += LINE / 2
    shapes += legend([Origin(*each) for each in found["origins"]], top)
    width, height = 2 * MARGIN + COLUMNS * CHARACTER, top + MARGIN
    title = f"{found['new_tokens']} tokens in {found['passes']} passes"
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14" xml:space="preserve">\n'
        f"<title>{title}</title>\n"
        f'<rect width="100%" height="100%" rx="6" fill="#fff"/>\n{body}\n</svg>\n'
    )


def load_results() -> dict[str, Any]:
    """Return what the results file says."""
    loaded: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return loaded


def main() -> int:
    """Decode, and draw or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="decode with it; else the results file is drawn")
    parser.add_argument("--prompt", default="edit-18", metavar="ID", help="default: edit-18")
    parser.add_argument("--new-tokens", type=int, default=160, metavar="N", help="most of the answer (default: 160)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the picture is out of date")
    arguments = parser.parse_args()
    if arguments.bundle:
        try:
            decoded = decode(arguments.bundle, arguments.prompt, arguments.new_tokens)
        except DynamoError as error:
            sys.exit(f"picture: error: {error}")
        write_whole(RESULTS, json.dumps(decoded, indent=1, ensure_ascii=False) + "\n")
    return write_or_check(PICTURE, drawn(load_results()), check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
