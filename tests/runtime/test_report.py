"""Reports say what the profile says: as text, Markdown, CSV and HTML, alone and side by side."""

import csv
import io
import itertools
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import devices
import pytest
from page import wrapped
from support import profiles

from dynamo_runtime.device.profile import Profile
from dynamo_runtime.device.records import Pass
from dynamo_runtime.errors import ProfileError
from dynamo_runtime.profiling import report
from dynamo_runtime.profiling.page import page
from dynamo_runtime.tables import WIDTH, Table, number

FULL, SLOW, SPARSE = profiles.full(), profiles.full(2.5), profiles.sparse()
APART = profiles.apart()
NASTY = '_<script src="http://evil.test/x.js">&|`$x$</script>'
VOID = {"meta", "link", "br", "img", "input", "hr"}


def row(text: str, title: str, name: str) -> list[str]:
    """Cells of a row in a section of a text report."""
    section = f"\n{text}".split(f"\n{title}", 1)[1].split("\n\n")[0]
    line = next(line for line in section.splitlines() if re.match(rf"  {re.escape(name)}(  |$)", line))
    return re.split(r" {2,}", line.strip())[1:]


# --- tables -----------------------------------------------------------------------------------------------------------


def test_columns_are_aligned_and_wrapped() -> None:
    table = Table("T", ["name", "a", "b"], [["x", "1", "22"], ["group"], ["a longer name", "word " * 9, "3"]])
    lines = table.text().splitlines()
    assert lines[:3] == ["T", f"  {'name':13}{'a':>26}{'b':>4}", f"  {'x':13}{'1':>26}{'22':>4}"]
    assert lines[3:5] == ["", "  group"]
    assert lines[5] == "  a longer name  word word word word word   3"
    assert lines[6] == "                      word word word word"


def test_columns_that_do_not_fit_follow_below() -> None:
    columns = [f"column {i} of many" for i in range(12)]
    text = Table("T", ["name", *columns], [["row", *map(str, range(12))]]).text()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert re.findall(r"column \d+ of many", text) == columns
    rows = [line.split()[1:] for line in text.splitlines() if line.startswith("  row ")]
    assert list(itertools.chain(*rows)) == [str(i) for i in range(12)]
    assert len(rows) == text.count("  name ") > 1


def test_cells_cannot_break_out() -> None:
    table = Table("T", ["a", "b"], [["x\ny\x1b[31m", "1 | `2` <b> \\"]])
    assert "\x1b" not in table.text() and len(table.text().splitlines()) == 3
    last = table.markdown().splitlines()[-1]
    assert len(re.findall(r"(?<!\\)\|", last)) == 3 and "<" not in last and last.count("\\`") == 2


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (0.0123, "0.012"), (1.236, "1.24"), (12.34, "12.3"), (1234.4, "1,234"), (math.nan, "–"), (None, "–")],
)
def test_numbers(value: float | None, shown: str) -> None:
    assert number(value) == shown


# --- one profile ------------------------------------------------------------------------------------------------------


def test_summary_has_the_figures() -> None:
    text = report.summary(FULL)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert row(text, "Device", "CPU") == ["AMD EPYC 9B14"]
    assert row(text, "Device", "caches") == ["L1d 32 KiB, L2 1 MiB, L3 32 MiB"]
    assert row(text, "Device", "instruction sets") == ["AVX2, AVX-512, VNNI"]
    assert row(text, "Bundle", "precision") == ["int8"]
    assert row(text, "Load", "load, s") == ["0.42"]
    assert row(text, "Load", "peak memory, MB") == ["62.5"]
    assert row(text, "First token, ms", "256") == ["5.88", "6.29", "7.70", "43,567"]
    passes = {(p.heads, p.rows, p.past): p.time for p in FULL.passes}
    for heads, title in ((False, "A pass without further heads"), (True, "A pass with further heads")):
        for rows in profiles.ROWS:
            expected = [
                f"{passes[heads, rows, past].p50:.2f} "
                f"({passes[heads, rows, past].p50 / passes[False, 1, past].p50:.2f})"
                for past in profiles.PASTS
            ]
            assert row(text, title, str(rows)) == expected
    one = passes[True, 1, 1984]
    section = text.split("A pass over one row, ms")[1]
    assert re.search(rf"with +1,984 +{one.p50:.2f} +{one.p90:.2f} +{one.p99:.2f} +{one.p50 * 0.94:.2f}\n", section)
    assert row(text, "Resuming", "8") == ["0.10"]
    floor = FULL.roofline[1]
    share = f"{floor.floor / floor.measured:.0%}".replace("%", " %")
    assert row(text, "Roofline", "512")[1:] == [f"{floor.floor:.2f}", f"{floor.measured:.2f}", share]
    assert row(text, "Slowest operators", "MatMulNBits") == ["0.61", "31"]
    assert "Operator8" not in text  # the eleventh
    assert row(text, "Strategies", "dynamo, ε_b 0.5") == ["2.73", "1,201", "1.58 [1.55, 1.61]", "0.81 0.72"]
    assert row(text, "Time between tokens", "speculative, 2 drafts") == ["0.99", "1.06", "1.30"]
    assert row(text, "Drafts that were right", "0.35") == ["0.34 (400)", "0.34 (200)"]
    assert row(text, "Back-off", "0.5") == ["2.00", "1.51 [1.47, 1.55]"]


def test_the_drafters_graph_is_in_every_report() -> None:
    text = report.summary(APART)
    assert "with further heads, p50" not in text and "Resuming" not in text
    for each in APART.drafter.layers:  # type: ignore[union-attr]
        p50, p90, p99 = each.time.p50, each.time.p90, each.time.p99
        line = rf"\n  {each.positions} +{each.past:,} +{p50:.2f} +{p90:.2f} +{p99:.2f} +{each.inside:.2f}\n"
        assert re.search(line, text.split("The drafter's layers")[1])
    assert row(text, "The drafter's drafts", "depth 3") == ["0.070", "0.075", "0.092", "0.050"]
    assert row(report.summary(replace(APART, drafter=profiles.runs(False))), "The drafter's drafts", "all")
    found = {(r["section"], r["name"], r["variant"]): r for r in csv.DictReader(io.StringIO(report.to_csv(APART)))}
    assert len(found) == len(report.csv_rows(APART)) - len(APART.device.instruction_sets) + 1
    assert float(found["drafter's layers", "past 64, positions 128", "p50"]["value"]) == profiles.layers(128, 64)
    assert float(found["drafter's drafts", "depth 4", "inside p50"]["value"]) == 0.05
    lines = report.compare_profiles([FULL, APART], ["inside", "apart"])
    assert re.search(r"The drafter's layers, p50 in ms\n.*past 64, positions 1 +– +0.31 \(–\)\n", lines)
    labels = [a["aria-label"] or "" for a in Page(page([APART], ["apart"])).all("div") if a.get("role") == "img"]
    first, last = profiles.layers(1, 64), profiles.layers(128, 64)
    assert any(f"layers: {number(first)} at 1 to {number(last)} at 128" in label for label in labels)


def test_summary_says_first_that_the_machine_was_not_idle() -> None:
    assert "IDLE" not in report.summary(FULL) and "QUICK" not in report.summary(FULL)
    busy = replace(FULL, conditions=replace(FULL.conditions, idle=False, busy=0.234, drift=1.124))
    for text in (report.summary(busy), report.markdown(busy)):
        first = text.split("\n\n")[0].replace("\n", " ")
        assert first.lstrip("*").startswith("NOT IDLE")
        assert "23 %" in first and "1.12 times" in first
    assert "not known" in report.summary(SPARSE).split("\n\n")[0]
    assert "QUICK RUN" in report.summary(SPARSE).split("\n\n")[1]


def test_what_was_not_measured_is_left_out() -> None:
    for text in (report.summary(SPARSE), report.markdown(SPARSE)):
        for title in ("First token", "A pass with further", "Resuming", "Roofline", "operators", "Strategies",
                      "Time between", "Drafts", "The drafter", "Back-off", "GPU", "instruction sets",
                      "outside the pass"):  # fmt: skip
            assert title not in text
    assert row(report.summary(SPARSE), "A pass without", "4") == ["8.00 (1.60)"]


def test_passes_that_always_have_heads_have_no_ratio() -> None:
    only = replace(SPARSE, passes=[Pass(True, 2, 64, profiles.quantiles(3.0), 2.9)])
    assert row(report.summary(only), "A pass with further heads", "2") == ["3.00 (–)"]
    assert page([only], ["heads only"])


def test_markdown_has_the_tables_of_the_summary() -> None:
    text = report.markdown(FULL)
    for table in report.tables(FULL):
        assert f"**{table.title}**" in text
        for cells in table.rows:
            assert (f"| {' | '.join(cells)} |" if table.columns else ": ".join(cells)) in text
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == sum(bool(table.columns) for table in report.tables(FULL))
    assert all(len({line.count("|") for line in block.splitlines()}) == 1 for block in blocks)


@pytest.mark.parametrize("name", ['=HYPERLINK("http://evil.test")', "+1", "-2+3", "@x", " =1", "\t=1", "x\x1b[31m"])
def test_a_name_is_no_formula(name: str) -> None:
    """Nor does it talk to a terminal; figures stay numbers, whatever their sign."""
    profile = replace(FULL, bundle=replace(FULL.bundle, name=name), bandwidth=-1.5)
    found = {r["name"]: r["value"] for r in csv.DictReader(io.StringIO(report.to_csv(profile)))}
    assert name not in found.values() and float(found["bandwidth"]) == -1.5
    cells = [cell for line in csv.reader(io.StringIO(report.to_csv(profile))) for cell in line]
    assert not any(cell.lstrip().startswith(("=", "+", "@")) or "\x1b" in cell for cell in cells)
    assert [cell for cell in cells if cell.startswith("-")] == ["-1.5"]


def test_csv_holds_every_figure_exactly() -> None:
    read = list(csv.DictReader(io.StringIO(report.to_csv(FULL))))
    assert list(read[0]) == ["section", "name", "variant", "unit", "value"]
    found = {(r["section"], r["name"], r["variant"]): (r["unit"], r["value"]) for r in read}
    assert len(found) == len(read) - len(FULL.device.instruction_sets) + 1  # rows can be told apart
    for p in FULL.passes:
        key = f"pass {'with' if p.heads else 'without'} heads", f"past {p.past}, m {p.rows}"
        for level in ("p50", "p90", "p99"):
            unit, value = found[*key, level]
            assert unit == "ms" and float(value) == getattr(p.time, level)
        assert int(found[*key, "count"][1]) == 50
        assert float(found[*key, "inside p50"][1]) == p.inside
    for run in FULL.strategies:
        for section, estimate in (
            ("tokens a pass", run.tokens_per_pass),
            ("speed", run.tokens_per_s),
            ("speed over plain", run.ratio),
        ):
            for part in ("value", "low", "high"):
                assert float(found[section, run.name, part][1]) == getattr(estimate, part)
        for depth, share in enumerate(run.acceptance, 1):
            assert float(found["accepted", run.name, f"depth {depth}"][1]) == share
    assert float(found["first token", "prompt 1024", "p99"][1]) == FULL.prefill[-1].first_token.p99
    assert float(found["resume", "skipped 64", ""][1]) == 0.733
    assert found["roofline", "past 64", "read"] == ("bytes", str(FULL.roofline[0].bytes))
    assert found["operator", "Operator9", "nodes"][1] == "10"  # all of them
    assert int(found["acceptance", "sampled, depth 2, confidence 0.95", "accepted"][1]) == FULL.acceptance[-1].accepted
    assert float(found["back-off", "ε_b 0.9", "high"][1]) == FULL.backoff[-1].speedup.high
    assert found["device", "cache", "L2"] == ("bytes", str(1 << 20))
    assert found["load", "outside the pass", "draft"] == ("ms", "0.0331")
    assert {r["section"] for r in csv.DictReader(io.StringIO(report.to_csv(SPARSE)))} == {
        "device", "conditions", "bundle", "load", "pass without heads"
    }  # fmt: skip


# --- several profiles -------------------------------------------------------------------------------------------------


def test_compare_gives_values_and_ratios() -> None:
    text = report.compare_profiles([FULL, SLOW, SPARSE], ["edge", "slow", "arm"])
    assert max(map(len, text.splitlines())) <= WIDTH
    assert row(text, "Side by side", "CPU") == ["AMD EPYC 9B14", "AMD EPYC 9B14", "Cortex-A76"]
    assert row(text, "Side by side", "onnxruntime") == ["1.32.0", "1.32.0", "1.31.0"]
    assert row(text, "Side by side", "precision") == ["int8", "int8", "fp32"]
    lines = {line[:38].strip(): re.split(r" {2,}", line[38:].strip()) for line in text.splitlines() if line}
    assert lines["load, s"] == ["0.42", "1.04 (2.50)", f"1.20 ({1.2 / 0.417:.2f})"]
    assert lines["bandwidth, GB/s"] == ["18.2", "18.2 (1.00)", f"7.50 ({7.5 / 18.25:.2f})"]
    assert lines["1,024 prompt tokens"] == ["22.0", "55.0 (2.50)", "–"]
    without, given = text.split("A pass without further heads")[1].split("A pass with further heads")
    first, other = profiles.cost(4, 64, False), 8.0
    assert re.search(rf"past 64, m 4 +{first:.2f} +{first * 2.5:.2f} \(2.50\) +8.00 \({other / first:.2f}\)\n", without)
    first = profiles.cost(8, 1984, True)
    assert re.search(rf"past 1,984, m 8 +{first:.2f} +{first * 2.5:.2f} \(2.50\) +–\n", given)
    speeds = text.split("Strategies, tokens/s\n")[1]
    assert re.search(rf"plain +760 +{760 / 2.5:.0f} \(0.40\) +–\n", speeds)
    ratios = text.split("Strategies, tokens/s ÷ plain\n")[1]
    assert re.search(r"dynamo, ε_b 0.5 +1.58 +1.58 \(1.00\) +–$", ratios)


def test_compare_says_which_were_not_idle_or_quick() -> None:
    text = report.compare_profiles([FULL, SPARSE], ["edge", "arm"])
    assert text.startswith("arm: NOT IDLE")
    assert "arm: QUICK RUN" in text and "edge: " not in text
    assert row(text, "Side by side", "idle") == ["yes", "NO"]
    assert row(text, "Side by side", "quick run") == ["no", "yes"]


def test_figures_only_the_second_has_are_shown() -> None:
    text = report.compare_profiles([SPARSE, FULL], ["arm", "edge"])
    assert re.search(r"64 prompt tokens +– +1.84 \(–\)\n", text)


def test_compare_needs_a_name_for_each() -> None:
    with pytest.raises(ValueError, match="zip"):
        report.compare_profiles([FULL, SLOW], ["one"])


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What is in a page: tags with their attributes, texts, and whether all tags are closed in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def single() -> str:
    return page([FULL], ["python-t3-int8"])


@pytest.fixture(scope="module")
def several() -> str:
    return page([FULL, replace(SLOW, bundle=replace(SLOW.bundle, name=NASTY)), SPARSE], ["edge", NASTY, "arm"])


def test_page_asks_for_nothing(single: str, several: str) -> None:
    for content in (single, several):
        addresses = set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"'<>]*", content.replace("http://evil.test", "")))
        assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        parsed = Page(content)
        for tag, attributes in parsed.tags:
            assert tag not in ("script", "img", "iframe", "object", "image")
            for name in ("src", "href", "xlink:href", "data"):
                assert (attributes.get(name) or "#").startswith(("#", "data:,"))
        assert "@import" not in content and set(re.findall(r"url\((.)", content)) <= {"#"}


def test_page_is_described(single: str, several: str) -> None:
    for content, plots in ((single, 6), (several, 6)):
        parsed = Page(content)
        assert parsed.all("html")[0]["lang"] == "en"
        assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in parsed.all("meta")
        assert len(parsed.all("title")) == len(parsed.all("h1")) == 1
        labels = [a["aria-label"] for a in parsed.all("div") if a.get("role") == "img"]
        assert len(labels) == len(parsed.all("svg")) == len(parsed.all("figure")) == plots
        assert all(label and re.match(r"(Line|Bar) plot: .*\d", label) for label in labels)
        assert all(a.get("scope") in ("col", "row", "colgroup") for a in parsed.all("th"))
        ids = re.findall(r'\sid="([^"]+)"', content)
        assert len(ids) == len(set(ids))
        assert "prefers-color-scheme: dark" in content
    assert len(Page(single).all("table")) == len(report.tables(FULL))


def test_page_has_the_figures(single: str, several: str) -> None:
    texts = set(Page(single).texts)
    for table in report.tables(FULL):
        assert {table.title, *(cell for cells in table.rows for cell in cells)} <= texts
    labels = [a["aria-label"] or "" for a in Page(single).all("div") if a.get("role") == "img"]
    first, last = profiles.cost(1, 64, False), profiles.cost(8, 64, False)
    assert f"without further heads: {first:.2f} at 1 to {last:.2f} at 8" in labels[0]
    assert f"with further heads: {profiles.cost(1, 1984, True):.2f} at 1" in labels[1]
    assert f"roofline floor: {FULL.roofline[0].floor:.2f} at 64" in labels[2]
    assert "dynamo, ε_b 0.5: 1.58, from 1.55 to 1.61" in labels[3] and "plain:" not in labels[3]
    texts = set(Page(several).texts)
    assert {"1.04 (2.50)", "Cortex-A76", "3 profiles side by side"} <= texts
    assert any("NOT IDLE" in text for text in texts)


def test_page_escapes_names(several: str) -> None:
    assert "<script" not in several and "evil.test" in several
    assert NASTY in Page(several).texts


def test_page_leaves_out_what_was_not_measured() -> None:
    content = page([SPARSE], ["arm"])
    parsed = Page(content)
    assert len(parsed.all("svg")) == 2  # cost by rows at the only past, and by the past
    assert "Strategies" not in parsed.texts
    assert page([SPARSE], ["arm"]) == content  # nothing in it depends on time or chance


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_page_names_the_missing_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ProfileError, match=r"needs the extra \[profile\]: pip install 'dynamo-edge\[profile\]'"):
        page([FULL], ["x"])


# --- docs/devices.md --------------------------------------------------------------------------------------------------


def run_devices(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> int:
    """Run the script; returns its exit status."""
    arguments = ["devices.py", "--profiles", str(folder), "--output", str(folder / "devices.md"), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    return devices.main()


def test_devices_page_is_written_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="no profiles"):
        run_devices(monkeypatch, tmp_path)
    FULL.save(tmp_path / "a.json")
    SPARSE.save(tmp_path / "b.json")
    assert run_devices(monkeypatch, tmp_path, "--check") == 1
    assert "out of date: run python benchmarks/devices.py" in capsys.readouterr().err
    assert not (tmp_path / "devices.md").exists()
    assert run_devices(monkeypatch, tmp_path) == 0
    assert run_devices(monkeypatch, tmp_path, "--check") == 0
    text = (tmp_path / "devices.md").read_text(encoding="utf-8")
    cost = [profiles.cost(4, 64, heads) / profiles.cost(1, 64, False) for heads in (False, True)]
    assert (
        f"| 2 cores of AMD EPYC 9B14 | cpu | python-t3-int8 | int8 | 760 | {cost[0]:.2f} | {cost[1]:.2f} "
        "| dynamo, ε_b 0.5 | 1.58 [1.55, 1.61] |" in text
    )
    assert "| 4 cores of Cortex-A76 (not idle, quick run) | cpu | tiny | fp32 | – | 1.60 | – | – | – |" in text
    assert wrapped(report.markdown(FULL)) in text and wrapped(report.markdown(SPARSE)) in text
    (tmp_path / "b.json").unlink()
    assert run_devices(monkeypatch, tmp_path, "--check") == 1


def test_profiles_survive_being_kept(tmp_path: Path) -> None:
    FULL.save(tmp_path / "a.json")
    assert report.summary(Profile.load(tmp_path / "a.json")) == report.summary(FULL)
