"""Open-ended generation: every prompt, at every seed, in every setting, timed side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from dynamo_runtime import Engine
from dynamo_runtime.engine import Generation

from .errors import EvaluationError
from .measures import measure
from .prompts import Prompt
from .results import Record, Results
from .settings import Setting

GENERATION = "generation"
TURN_SEPARATOR = "\n\n"
_WARM_UP_TOKENS = 16


def key(record: Record) -> tuple[str, str, int]:
    """What a generation is one of: setting, prompt, seed. A conversation is done once its last turn is."""
    return record["setting"], record["prompt"], record["seed"]


def check_length(engines: Sequence[Engine], prompts: Sequence[Prompt], template: str, max_new_tokens: int) -> None:
    """Find out before the work begins whether every prompt fits.

    Raises:
        EvaluationError: One has too many tokens.
    """
    room = min(engine.session.max_length for engine in engines)
    for prompt in prompts:
        answers = max_new_tokens * len(prompt.turns)
        length = len(engines[0].encode(TURN_SEPARATOR.join(fill(template, turn) for turn in prompt.turns)))
        if length + answers > room:
            raise EvaluationError(
                f"prompt {prompt.id} has {length} tokens, too many for {answers} more in a context of {room}"
            )


def run(
    results: Results,
    multi: Engine,
    plain: Engine,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    settings: Sequence[Setting],
    *,
    sampling: Mapping[str, Any],
    max_new_tokens: int,
    ignore_eos: bool,
    template: str,
) -> None:
    """Do what is not done yet.

    All settings continue one prompt at one seed before the next is taken up, in an order that rotates, so that a drift
    of the machine's speed falls on all alike.

    Args:
        results: Grows by one record a generation: text, tokens, passes, seconds of decoding (the prompt's cost is left
            out), steps by their size, and the measures of `measures.measure`.
        multi: Runs the settings that are not plain.
        plain: Runs those that are, and judges likelihoods.
        prompts: All of them.
        seeds: All of them.
        settings: All of them.
        sampling: Parameters of all settings, whatever the bundles' own defaults are.
        max_new_tokens: A turn.
        ignore_eos: See `Engine.stream`.
        template: What a turn is put into, with {prompt}.
    """
    done = results.done(GENERATION, lambda record: (*key(record), record["turn"]))
    options = {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos}
    warm = False
    with tqdm(total=len(prompts) * len(seeds) * len(settings), disable=None, unit="text") as bar:
        for number, (seed, index) in enumerate((seed, index) for index in range(len(prompts)) for seed in seeds):
            prompt = prompts[index]
            last = len(prompt.turns) - 1
            shift = number % len(settings)
            for setting in (*settings[shift:], *settings[:shift]):
                bar.update()
                if (setting.name, prompt.id, seed, last) in done:
                    continue
                if not warm:
                    _warm_up(multi, plain, prompts[0], settings, sampling, template)
                    warm = True
                engine = plain if setting.plain else multi
                chosen = {**sampling, **setting.sampling, "strategy": setting.strategy}
                draw = seed * len(prompts) + index
                for turn, text, result in _converse(engine, prompt, template, draw, options | chosen):
                    if (setting.name, prompt.id, seed, turn) not in done:
                        record = _record(result) | {
                            "measures": measure(plain, text, result.text, result.tokens, prompt.code)
                        }
                        place = {"setting": setting.name, "prompt": prompt.id, "turn": turn, "seed": seed}
                        results.append({"kind": GENERATION} | place | record)


def _warm_up(
    multi: Engine,
    plain: Engine,
    prompt: Prompt,
    settings: Sequence[Setting],
    sampling: Mapping[str, Any],
    template: str,
) -> None:
    """The first passes of a session are slow."""
    for strategy, is_plain in dict.fromkeys((setting.strategy, setting.plain) for setting in settings):
        engine = plain if is_plain else multi
        text = fill(template, prompt.turns[0])
        engine.generate(text, strategy=strategy, max_new_tokens=_WARM_UP_TOKENS, seed=0, **sampling)


def _converse(
    engine: Engine, prompt: Prompt, template: str, seed: int, options: Mapping[str, Any]
) -> Iterator[tuple[int, str, Generation]]:
    """Every turn's number, the text up to it, and its answer."""
    text = ""
    for turn, said in enumerate(prompt.turns):
        text += fill(template, said)
        engine.reset()
        engine.generate(text, **{**options, "max_new_tokens": 1, "seed": seed})  # decoding is timed, not the prompt
        result = engine.generate(text, **options, seed=seed)
        yield turn, text, result
        text += result.text + TURN_SEPARATOR


class Conversations:
    """What the texts of a results file continue, and what they are to a reader who sees a conversation as a whole."""

    def __init__(self, results: Results):
        """Index the generations."""
        self._template = results.header["template"]
        self._turns = {prompt.id: prompt.turns for prompt in map(Prompt.of, results.header["texts"])}
        self._texts = {(*key(record), record["turn"]): record["text"] for record in results.of(GENERATION)}

    def beginning(self, prompt: str) -> str:
        """The first turn."""
        return fill(self._template, self._turns[prompt][0])

    def continuation(self, setting: str, prompt: str, seed: int, turn: int) -> str | None:
        """All that follows the first turn, up to the answer to a turn; None if an answer is missing."""
        answers = [self._texts.get((setting, prompt, seed, i)) for i in range(turn + 1)]
        text = ""
        for i, answer in enumerate(answers):
            if answer is None:
                return None
            text += (TURN_SEPARATOR + fill(self._template, self._turns[prompt][i]) if i else "") + answer
        return text


def fill(template: str, said: str) -> str:
    """A turn as the model sees it."""
    return template.replace("{prompt}", said)


def _record(result: Generation) -> Record:
    statistics = result.statistics
    return {
        "text": result.text,
        "finish": result.finish_reason,
        "tokens": statistics.new_tokens,
        "passes": statistics.rounds,
        "seconds": round(statistics.total_s, 6),
        "steps": {str(size): count for size, count in sorted(statistics.steps.items())},
    }
