"""Wrong calls of the Python API and of the command lines: errors of our own and exits of argparse, nothing else."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from support import handmade, made_up, profiles

import dynamo_evaluate.commands.run as evaluate
from dynamo_runtime import Backend, Conversation, DynamoError, Engine, Profile, SamplingParameters, load_bundle
from dynamo_runtime.cli import profile, run

from .bundles import TEMPLATE
from .values import EXTREMES, damage_bytes, damage_json
from .workers import Log, Verdict, one_line

NO_LINE, SILENT_EXIT = "an exit without one line", "exit 0 and a complaint"
FORBIDDEN = {NO_LINE, SILENT_EXIT, "an error that is not one line"}
WRONG: tuple[Any, ...] = (*EXTREMES, b"bytes", object(), range(3), (1, 2), {1, 2}, print, int, 1j, Path("x"))
TEXTS = (
    "def f(",
    "",
    " ",
    "\n",
    "\0",
    "\ud800",
    "\ufeff",
    "🎉" * 50,
    "<s>",
    "x" * 3000,
    "日本語",
    "-",
    "--",
    "a\x1b[31m",
)
STRATEGIES = ("autoregressive", "speculative", "dynamo", "auto", "nobody")
_bundle: list[Path] = []
_profile: list[Path] = []
_results: list[Path] = []


def prepare(folder: Path) -> None:
    """A bundle to talk to, a profile, and a results file."""
    files = {"chat_template.jinja": TEMPLATE}
    tokenizer = handmade.train_tokenizer(control=["<s>", "</s>"])
    _bundle.append(handmade.write_bundle(folder / "calls", 3, tokenizer=tokenizer, files=files, bos_token_id=0))
    _profile.append(folder / "profile.json")
    profiles.full().save(_profile[0])
    _results.append(folder / "results.jsonl")
    made_up.grid(_results[0], [0.5, 1.0], 2, 2).close()


def case(rng: Random, scratch: Path, log: Log) -> Verdict:
    """One call, or one command."""
    return rng.choice((_call, _call, _command))(rng, scratch, log)


def _spoilt(rng: Random, given: dict[str, Any], likely: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Arguments of which one to three are not what they should be."""
    names = [*given, *likely]
    for name in rng.sample(names, min(len(names), rng.choice((1, 1, 2, 3)))):
        given[name] = rng.choice(likely[name]) if name in likely and rng.random() < 0.4 else rng.choice(WRONG)
    return given


SAMPLING: dict[str, tuple[Any, ...]] = {
    name: (0, 1, 0.5, 2.0, -1, 1e-300, 1e300, 50)
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "backoff_threshold", "draft_tokens")
}
SAMPLING |= {
    "cooccurrence_weight": (0, 0.5, 1),
    "adaptive_threshold": ("otsu", "none"),
    "first_token": ("base", "joint"),
    "draft_choice": ("argmax", "sample"),
    "draft_confidence": (0, 0.5, 1),
    "target_speedup": (1.5, 0, 10),
}
STREAM: dict[str, tuple[Any, ...]] = {
    "parameters": (SamplingParameters(), None),
    "strategy": STRATEGIES,
    "drafter": ("nobody", None),
    "max_new_tokens": (1, 3),
    "seed": (0, 2**70),
    "stop": ("x", ["x", "y"], ("",), ["x", 3]),
    "logits_processors": ([lambda tokens, logits: logits], [lambda tokens, logits: logits[:3]], [3]),
    "ignore_eos": (True,),
    "log_probabilities": (True,),
    "origins": (True,),
    "show_special": (True,),
    "plain_prompt": (True,),
}
BACKEND: dict[str, tuple[Any, ...]] = {
    "provider": ("cpu", "cuda", "nobody"),
    "provider_options": ({"x": "y"}, {"x": 3}),
    "threads": (1, 0, 3),
    "optimization": ("all", "basic", "none"),
}


def _call(rng: Random, scratch: Path, log: Log) -> Verdict:
    """One call of the Python API."""
    name = rng.choice(sorted(CALLS))
    try:
        CALLS[name](rng, log)
    except DynamoError as error:
        return one_line(error, log)
    return Verdict("done")


def _engine() -> Engine:
    return Engine(_bundle[0], provider="cpu", threads=1)


def _load(rng: Random, log: Log) -> None:
    given = _spoilt(rng, {"path": _bundle[0]}, {"verify": (True,), "path": TEXTS})
    log(f"load_bundle {given}")
    load_bundle(**given)


def _backend(rng: Random, log: Log) -> None:
    given = _spoilt(rng, {}, BACKEND)
    log(f"Backend {given}")
    Engine(_bundle[0], Backend(**given))


def _make(rng: Random, log: Log) -> None:
    likely = {"max_length": (1, 10, 10**9), "prefill_chunk": (1, 10**9), "profile": (profiles.full(),), **BACKEND}
    given = _spoilt(rng, {"bundle": _bundle[0], "provider": "cpu", "threads": 1}, likely)
    log(f"Engine {given}")
    Engine(**given).generate("def", max_new_tokens=2)


def _generate(rng: Random, log: Log) -> None:
    given = _spoilt(rng, {"prompt": rng.choice(TEXTS)}, STREAM | SAMPLING)
    given.setdefault("max_new_tokens", 4)
    if given["max_new_tokens"] is None or (isinstance(given["max_new_tokens"], int) and given["max_new_tokens"] > 99):
        given["stop"] = "e"
    log(f"generate {given}")
    _engine().generate(**given)


def _tokens(rng: Random, log: Log) -> None:
    pool = (0, 5, 5, 5, 300, *WRONG)
    prompt = [rng.choice(pool) for _ in range(rng.choice((0, 1, 2, 5)))]
    log(f"generate {prompt}")
    _engine().generate(prompt, max_new_tokens=3, strategy=rng.choice(STRATEGIES))


def _parameters(rng: Random, log: Log) -> None:
    given = _spoilt(rng, {}, SAMPLING)
    given.pop("target_speedup", None)
    log(f"SamplingParameters {given}")
    engine = _engine()
    engine.generate("def", SamplingParameters(**given), max_new_tokens=3, strategy=rng.choice(STRATEGIES))


def _chat(rng: Random, log: Log) -> None:
    pool = (*TEXTS, *WRONG)
    message: Any = {"role": rng.choice(("user", "system", *pool)), "content": rng.choice(pool)}
    if rng.random() < 0.3:
        message = rng.choice(WRONG)
    messages = rng.choice(([message], [message, message], message, ({"role": "user", "content": "x"}, message)))
    given = _spoilt(rng, {}, STREAM | {"trust_content": (True,)}) if rng.random() < 0.3 else {}
    log(f"chat {messages} {given}")
    _engine().chat(messages, **({"max_new_tokens": 3} | given))


def _converse(rng: Random, log: Log) -> None:
    system, question = rng.choice((None, *TEXTS, *WRONG)), rng.choice((*TEXTS, *WRONG))
    log(f"Conversation {system!r} {question!r}")
    conversation = Conversation(_engine(), system)
    for _ in conversation.say(question, max_new_tokens=3):
        pass


def _plan(rng: Random, log: Log) -> None:
    path = _profile[0].with_name(f"damaged-{os.getpid()}.json")
    _damage(rng, _profile[0], path, log)
    try:
        engine = Engine(_bundle[0], provider="cpu", threads=1, profile=Profile.load(path))
        engine.generate("def", max_new_tokens=3, strategy="auto")
    finally:
        path.unlink()


CALLS: dict[str, Callable[[Random, Log], None]] = {
    "load": _load,
    "backend": _backend,
    "engine": _make,
    "generate": _generate,
    "generate again": _generate,
    "tokens": _tokens,
    "parameters": _parameters,
    "chat": _chat,
    "conversation": _converse,
    "profile": _plan,
}


def _damage(rng: Random, sound: Path, path: Path, log: Log) -> None:
    """A file with one fault, in one of its lines."""
    if rng.random() < 0.2:
        data, what = damage_bytes(rng, sound.read_bytes())
    else:
        lines = sound.read_text().splitlines() if sound.suffix == ".jsonl" else [sound.read_text()]
        at = rng.randrange(len(lines))
        lines[at], what = damage_json(rng, json.loads(lines[at]))
        data = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    log(f"{sound.name}: {what}")
    path.write_bytes(data)


def _command(rng: Random, scratch: Path, log: Log) -> Verdict:
    """One command line."""
    name = rng.choice(sorted(COMMANDS))
    arguments = COMMANDS[name](rng, scratch, log)
    log(f"{name} {arguments}")
    main = {"dynamo-run": run.main, "dynamo-profile": profile.main, "dynamo-eval": evaluate.run}[name]
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    before = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(rng.choice(TEXTS).encode("utf-8", "surrogatepass")), "utf-8")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code: Any = main(arguments)
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.stdin = before
    complaints = [line for line in err.getvalue().splitlines() if "error:" in line]
    if code not in (0, None) and len(complaints) != 1:
        return Verdict(NO_LINE, name, f"{log}: exit {code}, {err.getvalue()[-200:]!r}")
    if code in (0, None) and complaints:
        return Verdict(SILENT_EXIT, name, f"{log}: {complaints}")
    return Verdict("done" if code in (0, None) else "one line")


def _flags(rng: Random, parser: argparse.ArgumentParser, leave_out: set[str]) -> list[str]:
    """Some of a parser's flags, with values that fit or do not."""
    actions = [each for each in parser._actions if each.option_strings and not leave_out & set(each.option_strings)]
    found: list[str] = []
    for action in rng.sample(actions, rng.choice((0, 1, 1, 2, 3))):
        found.append(rng.choice(action.option_strings))
        if action.nargs != 0 and rng.random() < 0.95:
            choices = list(map(str, action.choices or ()))
            value = rng.choice((*choices, "1", "0", "-1", "0.5", "nan", "inf", "1e400", "9" * 30, *TEXTS))
            found.append(value.replace("\0", "0"))
    return found


def _run(rng: Random, scratch: Path, log: Log) -> list[str]:
    prompt = rng.choice((*TEXTS, "nowhere/x", str(_profile[0]))).replace("\0", "0")
    leave_out = {"--help", "--version", "--max-new-tokens", "--threads", "--repeats"}
    flags = _flags(rng, run.build_parser(), leave_out)
    return [str(_bundle[0]), prompt, *flags, "--max-new-tokens", "3", "--threads", "1"]


def _profiles(rng: Random, scratch: Path, log: Log) -> list[str]:
    path = scratch / "damaged.json"
    _damage(rng, _profile[0], path, log)
    return ["--compare", str(_profile[0]), str(path)]


def _evaluate(rng: Random, scratch: Path, log: Log) -> list[str]:
    path = scratch / "damaged.jsonl"
    _damage(rng, _results[0], path, log)
    if rng.random() < 0.2:
        texts, bundle = scratch / "texts.jsonl", str(_bundle[0])
        texts.write_bytes(damage_bytes(rng, b'{"text": "def f(x):"}\n{"turns": ["a", "b"], "text": "if x:"}\n')[0])
        small = [
            "--thresholds",
            "0.5",
            "--limit",
            "1",
            "--threads",
            "1",
            "--out",
            str(scratch / "new.jsonl"),
            "--overwrite",
        ]
        return rng.choice(
            (
                ["generate", bundle, "--prompts", str(texts), "--seeds", "2", "--max-new-tokens", "2", *small],
                ["perplexity", bundle, str(texts), *small],
            )
        )
    return rng.choice((["report", str(path)], ["compare", str(_results[0]), str(path)], ["judge", str(path)]))


COMMANDS: dict[str, Callable[[Random, Path, Log], list[str]]] = {
    "dynamo-run": _run,
    "dynamo-profile": _profiles,
    "dynamo-eval": _evaluate,
}
