"""Writes docs/peers.md and its picture from the figures of `benchmarks/peers.py`.

    python benchmarks/peers_page.py [--results FILE] [--output FILE] [--check]

With --check nothing is written, and the exit status is 1 if the page is not what would be written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from page import wrapped, write_or_check
from peers import NOT_LOSSLESS
from ratios import Interval, interval, speed_ratio

from dynamo_runtime.tables import MISSING, Table, number

ROOT = Path(__file__).resolve().parent.parent
PICTURE = "images/peers.svg"
OURS, HEADS = "ours", "ours, further heads"
AIMS = (
    ("genai, our bundle", 0.78),
    ("genai, its own builder's", 1.00),
    ("llama.cpp", 1.00),
)
"""Our plain time a token over a peer's, at the same bits; a name stands for all that begin with it."""
AIM_CHAT = 1.30  # our best lossless tokens/s over the best peer's best, on chat

Row = dict[str, Any]


def of(rows: list[Row], **wanted: str) -> list[Row]:
    """Return the rows that have all of these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def shown(estimate: Interval) -> str:
    """With two decimals, and its 95 % interval."""
    value, low, high = estimate
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def time_ratio(ours: Row, theirs: Row) -> Interval:
    """Our time a token over theirs, paired by round or prompt."""
    return interval(speed_ratio, theirs["tokens"], theirs["seconds"], ours["tokens"], ours["seconds"])


def per_token(row: Row) -> float:
    """Return seconds a token."""
    return float(sum(row["seconds"]) / sum(row["tokens"]))


def precisions(content: Row) -> list[str]:
    """In the order they were run; those of which there is a plain bundle of ours."""
    return list(dict.fromkeys(row["precision"] for row in content["peers"] if row["peer"] == OURS))


def who(content: Row) -> Table:
    """Return what was run, and what it takes."""
    columns = ["precision", "peer", "decoding", "version", "flags", "model, MB", "load, s", "peak memory, MB"]
    rows = [
        [
            row["precision"],
            row["peer"],
            ", ".join(row["ways"]),
            row["version"],
            row["flags"],
            number(row["bytes"] / 1e6),
            number(row["load_s"]),
            number(row["peak_bytes"] / 1e6) if row["peak_bytes"] else MISSING,
        ]
        for row in content["peers"]
    ]
    return Table("Who, and what it takes", columns, rows)


def lengths(content: Row) -> Table:
    """Return the table of reading and plain decoding at fixed lengths."""
    columns = ["precision", "peer", "reading 512, tokens/s", "ms a token behind 64", "ours ÷ it"]
    columns += ["ms a token behind 1,024", "ours ÷ it"]
    rows = []
    for row in of(content["lengths"], measure="prefill"):
        key = {"precision": row["precision"], "peer": row["peer"]}
        cells = [*key.values(), number(1 / per_token(row))]
        for measure in ("short", "long"):
            theirs = of(content["lengths"], **key, measure=measure)[0]
            ours = of(content["lengths"], precision=row["precision"], peer=OURS, measure=measure)
            beside = shown(time_ratio(ours[0], theirs)) if ours and row["peer"] != OURS else MISSING
            cells += [number(per_token(theirs) * 1e3), beside]
        rows.append(cells)
    return Table("Plain decoding at fixed lengths", columns, rows)


def tasks_of(content: Row) -> list[str]:
    """In the order of the file."""
    return list(dict.fromkeys(row["task"] for row in content["answers"]))


def ways_of(content: Row) -> list[tuple[str, str, str]]:
    """(precision, peer, way) of all that answered."""
    return list(dict.fromkeys((row["precision"], row["peer"], row["way"]) for row in content["answers"]))


def speeds(content: Row) -> Table:
    """Answers: tokens a second by task."""
    tasks = tasks_of(content)
    rows = []
    for precision, peer, way in ways_of(content):
        found = {row["task"]: row for row in of(content["answers"], precision=precision, peer=peer, way=way)}
        drafted = sum(row["drafted"] for row in found.values())
        accepted = sum(row["accepted"] for row in found.values())
        first = statistics.median(second for row in found.values() for second in row["first_s"])
        cells = [number(1 / per_token(found[task])) for task in tasks]
        share = f"{accepted:,} of {drafted:,}" if drafted else MISSING
        rows.append([precision, peer, way, *cells, share, number(first * 1e3)])
    columns = ["precision", "peer", "decoding", *tasks, "drafts accepted", "first token, ms"]
    return Table("Answers, tokens/s by task", columns, rows)


def sides(content: Row, precision: str, task: str) -> tuple[list[Row], list[Row]]:
    """Our lossless ways and all of the peers' on a task."""
    rows = [row for row in of(content["answers"], precision=precision, task=task)]
    ours = [row for row in rows if row["peer"] in (OURS, HEADS) and row["way"] not in NOT_LOSSLESS]
    return ours, [row for row in rows if row["peer"] not in (OURS, HEADS)]


def bests(content: Row) -> Iterator[tuple[str, str, Row, Row]]:
    """(precision, task, our fastest lossless way, the fastest peer's) where there are both."""
    for precision in precisions(content):
        for task in tasks_of(content):
            ours, theirs = sides(content, precision, task)
            if ours and theirs:
                yield precision, task, min(ours, key=per_token), min(theirs, key=per_token)


def best_table(content: Row) -> Table:
    """Our best beside the best of all peers', and `auto` beside it."""
    rows = []
    for precision, task, ours, theirs in bests(content):
        auto = of(content["answers"], precision=precision, task=task, peer=OURS, way="auto")
        cells = [f"{row['peer']}, {row['way']}" for row in (ours, theirs)]
        ratios = [shown(time_ratio(theirs, row)) for row in [ours, *auto[:1]]]
        rows.append([precision, task, *cells, *ratios])
    columns = [
        "precision",
        "task",
        "our best lossless",
        "best peer",
        "tokens/s ÷ the peer's",
        "ours, auto ÷ the peer's",
    ]
    return Table("The best of either side", columns, rows)


def aims(content: Row) -> Table:
    """Aims, and what became of them."""
    rows = []
    for precision in precisions(content):
        for beginning, limit in AIMS:
            for measure, past in (("short", "64"), ("long", "1,024")):
                ours = of(content["lengths"], precision=precision, peer=OURS, measure=measure)
                for theirs in of(content["lengths"], precision=precision, measure=measure):
                    if ours and theirs["peer"].startswith(beginning):
                        found = time_ratio(ours[0], theirs)
                        what = f"plain time a token behind {past} ÷ {theirs['peer']}"
                        met = "met" if found[0] <= limit else "missed"
                        rows.append([precision, what, f"≤ {limit:.2f}", shown(found), met])
    for precision, task, our, their in bests(content):
        if task == "chat":
            found = time_ratio(their, our)
            met = "met" if found[0] >= AIM_CHAT else "missed"
            what = "our best lossless tokens/s on chat ÷ the best peer's best"
            rows.append([precision, what, f"≥ {AIM_CHAT:.2f}", shown(found), met])
    return Table("What was aimed at", ["precision", "what", "aim", "found", ""], rows)


def texts(content: Row) -> Table:
    """Greedy texts beside each other."""
    rows = []
    for row in content["agreement"]:
        cells = [
            f"{row[f'same_as_{other}']} of {row['texts']} ({row[f'in_common_with_{other}']:.0%})"
            if f"same_as_{other}" in row
            else MISSING
            for other in ("plain", "ours")
        ]
        rows.append([row["precision"], row["peer"], row["way"], *cells])
    columns = ["precision", "peer", "decoding", "its own plain text", "our plain text at this precision"]
    return Table("Texts that are the same (tokens in common before they part)", columns, rows)


def summary(content: Row) -> str:
    """Return where we are ahead and where behind, in sentences made of the figures."""
    lines = []
    for precision in precisions(content):
        ahead, behind = [], []
        for measure, past in (("short", "64"), ("long", "1,024")):
            ours = of(content["lengths"], precision=precision, peer=OURS, measure=measure)[0]
            for theirs in of(content["lengths"], precision=precision, measure=measure):
                if theirs["peer"] != OURS:
                    found = time_ratio(ours, theirs)
                    text = f"{theirs['peer']} behind {past} tokens ({found[0]:.2f})"
                    if found[2] < 1:
                        ahead.append(text)
                    elif found[1] > 1:
                        behind.append(text)
        line = f"- **{precision}, plain, our time a token over a peer's.** Faster than {_listed(ahead)}."
        line += f" Slower than {_listed(behind)}. What is in neither list cannot be told apart."
        lines.append(textwrap.fill(line, 116, subsequent_indent="  "))
    return "\n".join(lines)


def _listed(names: list[str]) -> str:
    return "; ".join(names) if names else "nobody"


def document(content: Row) -> str:
    """Return the whole page."""
    conditions, note = content["conditions"], content["taken"]
    marked = f" **{note}.**" if note else ""
    intro = f"""# Beside what you could use instead

{content["model"]} on {content["machine"]}; {content["threads"]} threads for everyone.{marked}
The same checkpoint, the same prompts and the same numbers of tokens; every peer in a process of its own, asked in turn
in an order that rotates. At fixed lengths {conditions["rounds"]} rounds, for answers {conditions["prompts"]} prompts
of each task with at most {conditions["new_tokens"]} tokens; brackets hold 95 % bootstrap intervals over rounds or
prompts. A ratio of times below 1, and one of tokens/s above 1, says that we are faster. This page is written by
`python benchmarks/peers_page.py` from `benchmarks/results/peers_smollm2.json`, which `benchmarks/peers.py` measures;
that script says how to get every peer.

![Time a token: plain at fixed lengths, and the best of every peer by task]({PICTURE})

{summary(content)}
"""
    tables = [aims(content), lengths(content), best_table(content), speeds(content), texts(content), who(content)]
    return wrapped("\n".join([intro, "\n\n".join(table.markdown() for table in tables), "", EXPLAINED]))


EXPLAINED = """
## How to read it

- **Whose clock.** llama.cpp is asked through `llama-server` and timed by the server itself, from the prompt's last
  logits to the last token, so HTTP is left out; the others by the clock around their calls in Python, which is what
  a user of theirs waits for. Loading is from opening the model to the first job that could be taken, without
  imports; llama-server's has its start in it. Peak memory is of the whole process, Python and libraries included,
  and pages of a mapped file count.
- **Threads.** All are told the same number. onnxruntime-genai's own number is another one where `genai_config.json`
  does not name it, which is what "its own threads" shows.
- **Bits.** 8 bits are blocks of 64 with ours and with onnxruntime-genai's builder, and of 32 in Q8_0 (8.5 bits a
  weight). 4 bits are blocks of 32 everywhere; the output embedding, a fifth of this model, is in 8 bits with us, in
  4 with onnxruntime-genai's builder, and in 6 (Q6_K) in llama.cpp's files. The KV cache is int8 with us, fp32 with
  onnxruntime-genai's builder and fp16 in llama.cpp. Texts of different kernels part sooner or later, so the last
  column of the texts says how alike they are, not who is right.
- **int4 of this checkpoint** does not keep the limits of `dynamo-quantize` (its weights come from a file of 4 bits
  already) and was written with `--allow-degraded`; it is here for its speed.
- **Drafting.** onnxruntime-genai drafts n-grams of the text. llama.cpp does so by `ngram-mod`: as `--spec-default`
  sets it, which wants 24 tokens to match and drafts at least 48, and with short matches and drafts; and by
  `ngram-simple` with short ones. Its `ngram-mod` remembers earlier answers of the same process, which may help it
  where they are alike. Drafts are accepted where they are the greedy choice, so a text that is not the peer's own
  plain one comes from kernels whose logits depend on the width of a pass. `lookup` is our drafter without a plan:
  as far as a match is long, in every pass.
- **Where we lose.** Plain decoding beside llama.cpp is a matter of kernels. Ours are onnxruntime's: a pass costs a
  fixed sum for its few hundred operators, which a small model feels most, and quantizes every row's activations
  anew at each product. Behind short texts that shows; behind long ones the KV cache decides, where 8 bits read less
  than 16, and one row's attention costs more arithmetic. A process of ours may be a fifth slower than another one, by
  where its memory lies ([rows.md](rows.md#options-of-a-session)).
- **transformers** in bf16 has twice the bytes of 8 bits to read, and Python between its operators.
"""


def plot(content: Row, path: Path) -> None:
    """Left, plain time a token at fixed lengths; right, the best of every peer by task; a row a precision."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "peers"}
    every = precisions(content)
    figure, axes = plt.subplots(len(every), 2, figsize=(12, 3.6 * len(every)), squeeze=False, layout="constrained")
    tasks = tasks_of(content)
    for (left, right), precision in zip(axes, every, strict=True):
        for place, (measure, past) in enumerate((("short", "64"), ("long", "1,024"))):
            rows = of(content["lengths"], precision=precision, measure=measure)
            heights = [row_place + 0.4 * place for row_place in range(len(rows))]
            left.barh(heights, [per_token(row) * 1e3 for row in rows], 0.38, label=f"behind {past} tokens")
        left.set_yticks([row_place + 0.2 for row_place in range(len(rows))], [row["peer"] for row in rows])
        left.invert_yaxis()
        left.set(xlabel="ms a token, plain", title=precision)
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        names = list(dict.fromkeys(row["peer"] for row in of(content["answers"], precision=precision)))
        for place, name in enumerate(names):
            best = [best_of(content, precision, name, task) for task in tasks]
            spots = [task_place + 0.8 * place / len(names) for task_place in range(len(tasks))]
            right.bar(spots, best, 0.8 / len(names), label=name)
        right.set_xticks([task_place + 0.4 for task_place in range(len(tasks))], tasks)
        right.set(ylabel="tokens/s, its best lossless way", title=precision)
        right.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def best_of(content: Row, precision: str, peer: str, task: str) -> float:
    """Return tokens a second of a peer's fastest lossless way."""
    rows = of(content["answers"], precision=precision, peer=peer, task=task)
    return 1 / min(per_token(row) for row in rows if row["way"] not in NOT_LOSSLESS)


def main(argv: list[str] | None = None) -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/peers_smollm2.json", metavar="FILE")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/peers.md", metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    arguments = parser.parse_args(argv)
    try:
        content = json.loads(arguments.results.read_text(encoding="utf-8"))
        page = document(content)
    except (OSError, ValueError, KeyError) as error:
        print(f"peers_page: error: {arguments.results} is no file of benchmarks/peers.py: {error!r}", file=sys.stderr)
        return 1
    if not arguments.check:
        plot(content, arguments.output.parent / PICTURE)
    return write_or_check(arguments.output, page, check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
