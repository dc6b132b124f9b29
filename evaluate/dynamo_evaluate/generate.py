"""Open-ended generation: every prompt, at every seed, in every setting, timed side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from dynamo_runtime import Engine
from dynamo_runtime.chat import asked
from dynamo_runtime.selection import read_by
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
    """Return what a generation is one of: setting, prompt, seed. A conversation is done once its last turn is."""
    return record["setting"], record["prompt"], record["seed"]


@dataclass(frozen=True)
class Chat:
    """How turns are put to a chat model.

    Attributes:
        system: What stands in front of them, if anything.
        trust_content: Whether turns may hold control tokens.
    """

    system: str | None = None
    trust_content: bool = False

    def read(self, engine: Engine, turns: Sequence[str], answers: Sequence[str]) -> list[int]:
        """Return the tokens of a conversation: see `Experiment.read`."""
        messages = asked(turns[0], self.system)
        for answer, turn in zip(answers, turns[1:], strict=True):
            messages += [{"role": "assistant", "content": answer}, *asked(turn)]
        bundle = engine.bundle
        prompt = bundle.chat_template.encode(messages, bundle.control_tokens, trust_content=self.trust_content)
        return prompt.encoded.ids


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
        chat: How turns are put to the model by its chat template instead; None if they are not.
    """

    prompts: Sequence[Prompt]
    settings: Sequence[Setting]
    seeds: int
    sampling: Mapping[str, Any]
    max_new_tokens: int
    ignore_eos: bool = False
    template: str = "{prompt}"
    chat: Chat | None = None

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
            **({"chat": asdict(self.chat)} if self.chat else {}),
        }

    def options(self, setting: Setting) -> dict[str, Any]:
        """Of `Engine.generate`."""
        limits = {"max_new_tokens": self.max_new_tokens, "ignore_eos": self.ignore_eos}
        sampling = read_by(setting.strategy, {**self.sampling, **setting.sampling})
        return {**limits, **sampling, "strategy": setting.strategy, "drafter": setting.drafter}

    def read(self, engine: Engine, turns: Sequence[str], answers: Sequence[str]) -> tuple[list[int], str]:
        """Return what the model reads before it answers the last turn: as tokens, and as the text that it goes on with.

        Args:
            engine: Of any of the bundles.
            turns: What was said.
            answers: To all of it but the last.
        """
        if self.chat is not None:
            return self.chat.read(engine, turns, answers), ""
        said = [fill(self.template, turn) for turn in turns]
        text = "".join(turn + answer + TURN_SEPARATOR for turn, answer in zip(said, answers, strict=False)) + said[-1]
        return engine.encode(text), text

    def draws(self) -> Iterator[Draw]:
        """Yield all settings of one prompt at one seed before the next, in an order that rotates."""
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
        read, _ = experiment.read(engines[0], prompt.turns, [""] * (len(prompt.turns) - 1))
        length = len(read)
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
        for turn, read, text, result in _converse(plain if setting.plain else multi, draw, experiment):
            if (setting.name, prompt.id, draw.seed, turn) not in done:
                measures = measure(plain, read, text, result.text, result.tokens, prompt.code)
                place = {"setting": setting.name, "prompt": prompt.id, "turn": turn, "seed": draw.seed}
                results.append({"kind": GENERATION, **place, **_record(result), "measures": measures})


def _warm_up(multi: Engine, plain: Engine, experiment: Experiment) -> None:
    """Warm a session up: its first passes are slow."""
    read, _ = experiment.read(multi, experiment.prompts[0].turns[:1], [])
    for setting in {(setting.strategy, setting.plain): setting for setting in experiment.settings}.values():
        engine = plain if setting.plain else multi
        engine.generate(read, **experiment.options(setting) | {"max_new_tokens": _WARM_UP_TOKENS, "seed": 0})


def _converse(engine: Engine, draw: Draw, experiment: Experiment) -> Iterator[tuple[int, list[int], str, Generation]]:
    """Yield every turn's number, what is read before its answer (see `Experiment.read`), and that."""
    options = experiment.options(draw.setting) | {"seed": draw.engine_seed}
    answers: list[str] = []
    for turn in range(len(draw.prompt.turns)):
        read, text = experiment.read(engine, draw.prompt.turns[: turn + 1], answers)
        engine.reset()
        engine.generate(read, **options | {"max_new_tokens": 1})  # decoding is timed, not the prompt
        result = engine.generate(read, **options)
        yield turn, read, text, result
        answers.append(result.text)


class Conversations:
    """What the texts of a results file continue, and what they are to a reader who sees a conversation as a whole."""

    def __init__(self, results: Results):
        """Index the generations."""
        self._template = results.header["template"]
        self._turns = {prompt.id: prompt.turns for prompt in map(Prompt.of, results.header["texts"])}
        self._texts = {(*key(record), record["turn"]): record["text"] for record in results.of(GENERATION)}

    def beginning(self, prompt: str) -> str:
        """Return the first turn."""
        return fill(self._template, self._turns[prompt][0])

    def continuation(self, setting: str, prompt: str, seed: int, turn: int) -> str | None:
        """Return all that follows the first turn, up to the answer to a turn; None if an answer is missing."""
        answers = [self._texts.get((setting, prompt, seed, i)) for i in range(turn + 1)]
        text = ""
        for i, answer in enumerate(answers):
            if answer is None:
                return None
            text += (TURN_SEPARATOR + fill(self._template, self._turns[prompt][i]) if i else "") + answer
        return text


def fill(template: str, said: str) -> str:
    """Return a turn as the model sees it."""
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
