"""Open-ended generation: every prompt, at every seed, in every setting, timed side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from dynamo_runtime import Engine
from dynamo_runtime.strategies import read_by
from dynamo_runtime.stream import Generation

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


@dataclass(frozen=True)
class Experiment:
    """What is generated.

    Attributes:
        prompts: All of them.
        settings: All of them.
        seeds: How many draws of every prompt in every setting.
        sampling: Parameters of all settings, whatever the bundles' own defaults are.
        max_new_tokens: A turn.
        ignore_eos: See `Engine.stream`.
        template: What a turn is put into, with {prompt}.
    """

    prompts: Sequence[Prompt]
    settings: Sequence[Setting]
    seeds: int
    sampling: Mapping[str, Any]
    max_new_tokens: int
    ignore_eos: bool = False
    template: str = "{prompt}"

    @property
    def record(self) -> dict[str, Any]:
        """For the header of a results file."""
        return {
            "texts": [prompt.record for prompt in self.prompts],
            "seeds": self.seeds,
            "max_new_tokens": self.max_new_tokens,
            "ignore_eos": self.ignore_eos,
            "template": self.template,
            "sampling": dict(self.sampling),
            "settings": [setting.record for setting in self.settings],
        }

    def options(self, setting: Setting) -> dict[str, Any]:
        """Of `Engine.generate`."""
        limits = {"max_new_tokens": self.max_new_tokens, "ignore_eos": self.ignore_eos}
        sampling = read_by(setting.strategy, {**self.sampling, **setting.sampling})
        return {**limits, **sampling, "strategy": setting.strategy}

    def draws(self) -> Iterator[Draw]:
        """All settings of one prompt at one seed before the next, in an order that rotates."""
        places = [(seed, index) for index in range(len(self.prompts)) for seed in range(self.seeds)]
        for number, (seed, index) in enumerate(places):
            shift = number % len(self.settings)
            for setting in (*self.settings[shift:], *self.settings[:shift]):
                yield Draw(setting, self.prompts[index], seed, seed * len(self.prompts) + index)


@dataclass(frozen=True)
class Draw:
    """One generation: setting, prompt, seed as it is recorded, and the engine's seed, which differs by prompt too."""

    setting: Setting
    prompt: Prompt
    seed: int
    engine_seed: int


def check_length(engines: Sequence[Engine], experiment: Experiment) -> None:
    """Find out before the work begins whether every prompt fits.

    Raises:
        EvaluationError: One has too many tokens.
    """
    room = min(engine.session.max_length for engine in engines)
    for prompt in experiment.prompts:
        answers = experiment.max_new_tokens * len(prompt.turns)
        text = TURN_SEPARATOR.join(fill(experiment.template, turn) for turn in prompt.turns)
        length = len(engines[0].encode(text))
        if length + answers > room:
            raise EvaluationError(
                f"prompt {prompt.id} has {length} tokens, too many for {answers} more in a context of {room}"
            )


def run(results: Results, multi: Engine, plain: Engine, experiment: Experiment) -> None:
    """Do what is not done yet.

    All settings continue one prompt at one seed before the next is taken up, in an order that rotates, so that a drift
    of the machine's speed falls on all alike.

    Args:
        results: Grows by one record a generation: text, tokens, passes, seconds of decoding (the prompt's cost is left
            out), steps by their size, and the measures of `measures.measure`.
        multi: Runs the settings that are not plain.
        plain: Runs those that are, and judges likelihoods.
        experiment: What to generate.
    """
    done = results.done(GENERATION, lambda record: (*key(record), record["turn"]))
    draws = list(experiment.draws())
    warm = False
    for draw in tqdm(draws, disable=None, unit="text"):
        setting, prompt = draw.setting, draw.prompt
        if (setting.name, prompt.id, draw.seed, len(prompt.turns) - 1) in done:
            continue
        if not warm:
            _warm_up(multi, plain, experiment)
            warm = True
        for turn, text, result in _converse(plain if setting.plain else multi, draw, experiment):
            if (setting.name, prompt.id, draw.seed, turn) not in done:
                measures = measure(plain, text, result.text, result.tokens, prompt.code)
                place = {"setting": setting.name, "prompt": prompt.id, "turn": turn, "seed": draw.seed}
                results.append({"kind": GENERATION, **place, **_record(result), "measures": measures})


def _warm_up(multi: Engine, plain: Engine, experiment: Experiment) -> None:
    """The first passes of a session are slow."""
    text = fill(experiment.template, experiment.prompts[0].turns[0])
    for setting in {(setting.strategy, setting.plain): setting for setting in experiment.settings}.values():
        engine = plain if setting.plain else multi
        engine.generate(text, **experiment.options(setting) | {"max_new_tokens": _WARM_UP_TOKENS, "seed": 0})


def _converse(engine: Engine, draw: Draw, experiment: Experiment) -> Iterator[tuple[int, str, Generation]]:
    """Every turn's number, the text up to it, and its answer."""
    options = experiment.options(draw.setting) | {"seed": draw.engine_seed}
    text = ""
    for turn, said in enumerate(draw.prompt.turns):
        text += fill(experiment.template, said)
        engine.reset()
        engine.generate(text, **options | {"max_new_tokens": 1})  # decoding is timed, not the prompt
        result = engine.generate(text, **options)
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
