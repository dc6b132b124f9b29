"""One text that a model writes, token by token, from an opening.

With a chat template the model invents questions and answers them in turn, and what the template has between them is put
in (Magpie: Xu et al. 2024, arXiv 2406.08464).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dynamo_runtime.bundle import Bundle
from dynamo_runtime.chat import ChatTemplate
from dynamo_runtime.control import ControlTokens
from dynamo_runtime.errors import ParameterError
from dynamo_runtime.parameters import SamplingParameters
from dynamo_runtime.sampling import draw, truncate

from .errors import TrainingError

REPEATED_SHARE, GRAM = 0.5, 4  # a text loops if more of its 4-grams than this occurred in it before
_WORD = "word"  # stands for what is said, so that what is around it is cut into tokens as it always is
_SAID = "\uf8f0\uf8f1\uf8f2"  # for private use: no template has them


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around what is said, as tokens.

    Attributes:
        opening: In front of the first question, the system's part included.
        answer: Between a question and its answer; begins with what ends a question, if there is such a token.
        question: Between an answer and the next question; begins with what ends an answer.
        question_ends: Tokens by which the model ends a question; empty where the template has none.
        answer_ends: Tokens by which it ends an answer.
    """

    opening: list[int]
    answer: list[int]
    question: list[int]
    question_ends: frozenset[int]
    answer_ends: frozenset[int]


def turns_of(template: ChatTemplate, control: ControlTokens, end_tokens: Sequence[int]) -> Turns:
    """Read off a chat template what it puts around what is said, whatever it is written like.

    Args:
        template: Of the bundle.
        control: Its control tokens.
        end_tokens: Those that end a text.

    Raises:
        PromptError: The template does not render a question, its answer and a second question.
        TrainingError: It does not put them one behind the other.
    """
    roles = ("user", "assistant", "user")
    rendered = template.render(
        [{"role": role, "content": said} for role, said in zip(roles, _SAID, strict=True)], add_generation_prompt=True
    )
    if [each for each in rendered if each in _SAID] != list(_SAID):
        raise TrainingError(
            "the chat template does not put question, answer and question one behind the other, so that no text can be "
            "written turn by turn: use --plain, which does without it"
        )
    text, places = "", []
    for each in rendered:
        if each in _SAID:
            places.append((len(text), len(text) + len(_WORD)))
        text += _WORD if each in _SAID else each
    found = control.encode(text)
    pieces = []
    for begin, end in zip([0, *(end for _, end in places)], [*(begin for begin, _ in places), len(text)], strict=True):
        inside = [span for span in found.spans if span[0] < begin < span[1]]
        if inside:
            raise TrainingError(
                "the chat template and this tokenizer make one token of the end of what is said and what follows it: "
                "use --plain, which does without the template"
            )
        tokens = zip(found.ids, found.spans, strict=True)
        pieces.append([token for token, (start, stop) in tokens if begin <= start and stop <= end])
    opening, _, question, answer = pieces
    if not all((opening, question, answer)):
        raise TrainingError("the chat template puts nothing between questions and answers: use --plain")
    ends = frozenset(end_tokens)

    def ended_by(piece: list[int]) -> frozenset[int]:
        return ends | ({piece[0]} if piece[0] in control.texts else set())

    # Where the template ends questions by mere text, the model has no token to end one with.
    question_ends = ended_by(answer) if answer[0] in control.texts else frozenset()
    return Turns(opening, answer, question, question_ends, ended_by(question))


@dataclass(frozen=True)
class Recipe:
    """How texts are written.

    Attributes:
        length: Most tokens of one.
        temperatures: Answers have one of these, drawn for every text; questions have 1.
        top_k: Candidates, of questions and answers.
        top_p: Nucleus among them.
    """

    length: int
    temperatures: tuple[float, ...]
    top_k: int
    top_p: float


class Writing:
    """A text in the making, as `dynamo_runtime.batch` takes it: a function of its opening and its seed.

    Attributes:
        number: Which of the corpus it is.
        seed: Of all its draws.
        tokens: So far.
        roles: 1 for a token that the model wrote as an answer (its end included), else 0; one for every token.
        recipe: How it is written.
        turns: What follows the end of a turn; None: the text ends there.
        ends: What ends it then.
        answers: Whether the model is writing an answer, not a question.
        temperature: Of its answers.
    """

    def __init__(
        self,
        number: int,
        seed: int,
        opening: Sequence[int],
        recipe: Recipe,
        *,
        turns: Turns | None = None,
        end_tokens: Sequence[int] = (),
        answers: bool = True,
    ):
        """Begin.

        Args:
            number: Which of the corpus it is.
            seed: Of all draws.
            opening: Tokens that are given.
            recipe: See there.
            turns: What follows the end of a turn; None: the text ends there.
            end_tokens: What ends it then.
            answers: Whether the model begins with an answer, not with a question.
        """
        self.number, self.seed = number, seed
        self.tokens = list(opening)
        self.roles = [0] * len(self.tokens)
        self._rng = np.random.default_rng(seed)
        self.recipe, self.turns, self.answers = recipe, turns, answers
        self.ends = frozenset(end_tokens)
        self._asking = SamplingParameters(temperature=1.0, top_k=recipe.top_k, top_p=recipe.top_p)
        self.temperature = recipe.temperatures[self._rng.integers(len(recipe.temperatures))]
        self._answering = replace(self._asking, temperature=self.temperature)
        self._begins = True  # a turn, which is to have something in it

    def go_on(self, logits: np.ndarray, ids: np.ndarray) -> bool:
        """Append the next token, or what the template puts behind the end of a turn; returns whether there is more."""
        turns, answers = self.turns, self.answers
        ends = self.ends if turns is None else turns.answer_ends if answers else turns.question_ends
        if self._begins:
            something = ~np.isin(ids, list(ends))
            logits, ids = logits[something], ids[something]
        token = choose(logits, ids, self._answering if answers else self._asking, self._rng.random())
        self._begins = token in ends
        if token not in ends:
            self._append([token], [int(answers)])
        elif turns is None:
            self._append([token], [int(answers)])
            return False
        else:
            piece = turns.question if answers else turns.answer
            self._append(piece, [int(answers and piece[0] == token), *[0] * (len(piece) - 1)])
            self.answers = not answers
            if not self.answers and not turns.question_ends:
                return False
        return len(self.tokens) < self.recipe.length

    def uniforms(self, count: int) -> np.ndarray:
        """Return what its next draws go by, in [0, 1), [count]; `go_on` takes them one by one."""
        return self._rng.random(count)

    def _append(self, tokens: Sequence[int], roles: Sequence[int]) -> None:
        room = self.recipe.length - len(self.tokens)
        self.tokens += tokens[:room]
        self.roles += roles[:room]


def choose(logits: np.ndarray, ids: np.ndarray, parameters: SamplingParameters, uniform: float) -> int:
    """Plain decoding's choice among the largest logits; arguments of `truncate` and `draw`."""
    if parameters.greedy:
        return int(ids[0])
    candidates = truncate(logits, ids, parameters)
    return int(candidates.ids[draw(candidates.probabilities, uniform)])


def loops(tokens: Sequence[int]) -> bool:
    """Tell whether a text repeats itself: more than half of its 4-grams stood in it before."""
    grams = list(zip(*(tokens[start:] for start in range(GRAM)), strict=False))
    return len(grams) - len(set(grams)) > REPEATED_SHARE * len(grams)


def first_token(bundle: Bundle) -> int:
    """Return what a text of a base model begins with.

    Raises:
        ParameterError: The bundle names no such token.
    """
    for token in (bundle.bos_token_id, *bundle.eos_token_ids):
        if token is not None:
            return token
    raise ParameterError("the model names no token that begins or ends a text: give --prompts")
