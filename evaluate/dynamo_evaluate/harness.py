"""A bundle as a model of lm-evaluation-harness, under the name "dynamo".

dynamo-eval harness run --model dynamo --model_args bundle=model.onnx --tasks lambada_openai
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from dynamo_runtime import Engine
from dynamo_runtime.errors import PromptError
from dynamo_runtime.scoring import score_base
from dynamo_runtime.selection import check_reads, refusal

from .errors import EvaluationError

MODEL = "dynamo"
_BACKEND = ("provider", "threads", "optimization")
# What tasks call the most new tokens, first come first served.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model(MODEL)
class DynamoLM(TemplateLM):
    """The first head's log-likelihoods, and text by any strategy.

    Tokens are cut, prefixed and windowed as the harness's own Hugging Face model does, so that both give the same.
    """

    def __init__(
        self,
        bundle: str | None = None,
        strategy: str = "auto",
        drafter: str | None = None,
        max_length: int | str | None = None,
        max_gen_toks: int | str = 256,
        add_bos_token: bool | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        **options: Any,
    ):
        """Load a bundle.

        Args:
            bundle: Its ONNX file or folder.
            strategy: Of `Engine.stream`, for `generate_until`.
            drafter: See `Engine.stream`.
            max_length: Most positions; None means the model's context length.
            max_gen_toks: Most new tokens where a task does not say.
            add_bos_token: Whether every text begins with special tokens; None means as the tokenizer does.
            batch_size: Texts run one by one; for the harness's sake.
            device: Not used: give `provider`.
            **options: Fields of `Backend` (provider, threads, …), and sampling parameters, which go before the task's.

        Raises:
            DynamoError: See `Engine`.
        """
        super().__init__()
        if bundle is None:
            raise EvaluationError("which bundle? give --model_args bundle=BUNDLE/model.onnx")
        backend = {name: options.pop(name) for name in _BACKEND if name in options}
        length = None if max_length is None else int(max_length)
        self._engine = Engine(bundle, max_length=length, **backend)
        self._engine.bundle.parameters(options)  # are there such parameters?
        check_reads(strategy, options, self._engine.bundle)
        if why := refusal(strategy, self._engine.bundle, options, drafter):
            raise EvaluationError(f"{bundle}: {why}")
        self._strategy, self._sampling, self._drafter = strategy, options, drafter
        self._max_gen_toks, self._add_bos_token = int(max_gen_toks), add_bos_token
        self._draws = 0

    @property
    def max_length(self) -> int:
        """Most positions of a text."""
        return self._engine.session.max_length

    @property
    def max_gen_toks(self) -> int:
        """Most new tokens where a task does not say."""
        return self._max_gen_toks

    @property
    def batch_size(self) -> int:
        """Texts run one by one."""
        return 1

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; 0 where the model has none."""
        ends = self._engine.bundle.eos_token_ids
        return ends[0] if ends else 0

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = self._engine.bundle.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self._engine.bundle.folder.resolve())

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the bundle's, for the record of a run; None where none is wanted."""
        return self._engine.bundle.chat_template.source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render messages as the text that the model is to answer, or else to go on with.

        Where the template refuses a system's message it is left out, as the harness's own Hugging Face model does.
        """
        render = partial(
            self._engine.bundle.chat_template.render,
            add_generation_prompt=add_generation_prompt,
            continue_final=not add_generation_prompt,
        )
        try:
            return render(chat_history)
        except PromptError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            return render(others)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return a text's tokens."""
        special = add_special_tokens
        if special is None:
            special = self._add_bos_token is not False
            bos = self._engine.bundle.bos_token_id
            token = None if bos is None else self._engine.bundle.tokenizer.id_to_token(bos)
            if token and string.startswith(token):
                special = False
        ids: list[int] = self._engine.bundle.tokenizer.encode(string, add_special_tokens=special).ids
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for request, context, continuation in tqdm(requests, disable=disable_tqdm, desc="log-likelihoods"):
            tokens = (context + continuation)[-self.max_length - 1 :]
            nll, choices = score_base(self._engine.session, tokens, max(0, len(tokens) - len(continuation) - 1))
            greedy = bool((choices == tokens[len(tokens) - len(choices) :]).all())
            found.append((-float(nll.sum()), greedy))
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows behind each other."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="rolling log-likelihoods"):
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            total = sum(each for each, _ in self._loglikelihood_tokens(parts, disable_tqdm=True))
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return texts up to the task's stop strings.

        Decoding is greedy, as the harness has it, unless the task or we say otherwise.
        """
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="texts"):
            context, wishes = request.args
            limit, stop, sampling = self._wishes(wishes)
            tokens = self.tok_encode(context)[-(self.max_length - limit) :]
            self._engine.reset()
            result = self._engine.generate(
                tokens or [self.prefix_token_id],
                strategy=self._strategy,
                drafter=self._drafter,
                max_new_tokens=limit,
                stop=stop,
                seed=self._draws,
                **sampling,
            )
            self._draws += 1  # a task may ask for several draws of one text
            found.append(result.text)
            self.cache_hook.add_partial("generate_until", (context, wishes), result.text)
        return found

    def _wishes(self, wishes: dict[str, Any]) -> tuple[int, Sequence[str], dict[str, Any]]:
        """Return a task's limit, stop strings and sampling parameters."""
        limit = next((int(wishes[name]) for name in _LIMITS if wishes.get(name) is not None), self._max_gen_toks)
        if limit >= self.max_length:
            raise EvaluationError(f"{limit} new tokens leave no room for a prompt in a context of {self.max_length}")
        until = wishes.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        sampling: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0}
        if wishes.get("do_sample") or (wishes.get("do_sample") is None and wishes.get("temperature")):
            named = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            sampling = {"temperature": 1.0, "top_k": 50, "repetition_penalty": 1.0}  # as in transformers
            sampling |= {name: wishes[name] for name in named if wishes.get(name) is not None}
        return limit, [text for text in stop if text], sampling | self._sampling
