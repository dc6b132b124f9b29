"""Many texts in lockstep: a checkpoint writes a token of each a pass, on torch, for which a GPU is made.

All rows stand at the same position, so that nothing is padded: a row that is still given (its opening, or what the
template has between turns) is fed that, the others what was drawn for them. A text is what `Writing.go_on` makes of the
same logits: one seed has the same draws here, made for all rows at once and where the logits are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from dynamo_model.checkpoint import load_base, load_tokenizer
from dynamo_model.output import Output
from dynamo_model.sources import find_checkpoint
from dynamo_runtime.bundle import Bundle
from dynamo_runtime.manifest import Source

from .errors import TrainingError
from .writing import Recipe, Writing

_LOOK_EVERY = 16
"""Positions between two looks at whether all texts have ended, each of which waits for the device."""


@contextmanager
def open_checkpoint(name: str, device: str) -> Iterator[tuple[PreTrainedModel, Bundle]]:
    """Load a checkpoint to write with: in bfloat16, or in float32 on a CPU.

    Args:
        name: As `dynamo_model.sources.find_checkpoint` takes it.
        device: torch's name of it, as `cuda`.

    Yields:
        The base on its device, and what a bundle of it would say: vocabulary, tokenizer, chat template.

    Raises:
        CheckpointError: There is something about the checkpoint.
        TrainingError: There is no such device.
    """
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"--device {device} is none that torch has here: {str(error).splitlines()[0]}") from error
    checkpoint = find_checkpoint(name)
    base, tokenizer = load_base(checkpoint), load_tokenizer(checkpoint)
    model: Any = base
    base = model.to(place, torch.float32 if place.type == "cpu" else torch.bfloat16).eval()
    vocab_size = int(model.get_output_embeddings().weight.shape[0])
    generation = base.generation_config
    ends = [base.config.eos_token_id, getattr(generation, "eos_token_id", None), tokenizer.eos_token_id]
    begins = [base.config.bos_token_id, getattr(generation, "bos_token_id", None)]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        yield (
            base,
            Bundle(
                folder=Path(folder),
                vocab_size=vocab_size,
                context_length=int(base.config.max_position_embeddings),
                kv_layers=0,
                kv_heads=0,
                head_size=0,
                top_k_outputs=vocab_size,
                bos_token_id=next(iter(_ids(begins, vocab_size)), None),
                eos_token_ids=tuple(_ids(ends, vocab_size)),
                source=Source(model=checkpoint.label),
            ),
        )


def _ids(found: list[Any], vocab_size: int) -> list[int]:
    """Return tokens named by configurations, each once: a number, several, or none."""
    ids = [token for each in found for token in (each if isinstance(each, list) else [each])]
    return list(dict.fromkeys(token for token in ids if isinstance(token, int) and 0 <= token < vocab_size))


class Lockstep:
    """A model that writes many texts at once, in waves; beside `dynamo_runtime.batch.Batch`.

    Args:
        base: Any decoder with a cache of transformers', on its device.
        rows: Texts of a wave.
        length: Most tokens of a text.
    """

    def __init__(self, base: PreTrainedModel, rows: int, length: int) -> None:
        model: Any = base
        head = model.get_output_embeddings()
        self._decoder, self._output = model.base_model, Output.of(base)
        self._weight: Tensor = head.weight.detach().float()
        self._bias = None if head.bias is None else head.bias.detach().float()
        self._config, self._rows, self._length = base.config, rows, length

    def write(self, texts: Iterable[Writing], after_pass: Callable[[int], None] | None = None) -> Iterator[Writing]:
        """Write texts of one corpus to their ends.

        Args:
            texts: So far their openings.
            after_pass: Told of every pass how many tokens it read.

        Yields:
            Each, when its wave has ended.

        Raises:
            TrainingError: The device has no memory for so many rows.
        """
        waiting = iter(texts)
        while wave := list(islice(waiting, self._rows)):
            try:
                self._write(wave, after_pass or (lambda _: None))
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    f"the device has no memory for {len(wave)} rows of {self._length} tokens: give a smaller --batch"
                ) from error
            yield from wave

    @torch.inference_mode()
    def _write(self, texts: list[Writing], after_pass: Callable[[int], None]) -> None:
        rows, cache = _Rows(texts, self._length, self._weight.device), self._cache()
        done, start = 0, min(len(text.tokens) for text in texts)
        for position in range(start, self._length):
            fed = rows.tokens[:, done:position]
            states = self._decoder(input_ids=fed, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            rows.put(position, self._output(states.float(), self._weight, self._bias))  # in bfloat16 logits would tie
            after_pass(fed.numel())
            done = position
            if position % _LOOK_EVERY == 0 and rows.ended(position + 1):
                break
        rows.hand_back(texts)

    def _cache(self) -> DynamicCache:
        """Return the cache that transformers would take.

        There is room for all positions from the start where a layer reads all of them.
        """
        cache = DynamicCache(config=self._config)
        cache.layers = [_Room(self._length) if type(each) is DynamicLayer else each for each in cache.layers]
        return cache


class _Room(DynamicLayer):
    """Keys and values of a layer in one buffer: a pass gets what is written of it, and nothing is copied."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._most, self._buffers = length, list[Tensor]()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [rows, heads, tokens, size]; returns all there are."""
        both, done = (key_states, value_states), self.get_seq_length()
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._buffers = [each.new_empty(*each.shape[:2], self._most, each.shape[3]) for each in both]
        end = done + key_states.shape[2]
        for buffer, new in zip(self._buffers, both, strict=True):
            buffer[:, :, done:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values


class _Rows:
    """Texts in the making as tensors, a row each; they take the steps of `Writing.go_on`.

    Attributes:
        tokens: [rows, length and room for what the template puts in].
    """

    def __init__(self, texts: list[Writing], length: int, device: torch.device) -> None:
        first = texts[0]  # what all texts of a corpus have in common
        self._recipe, turns = first.recipe, first.turns
        pieces = [[], []] if turns is None else [turns.answer, turns.question]  # behind a question, behind an answer
        ends = [first.ends] * 2 if turns is None else [turns.question_ends, turns.answer_ends]
        wide, count = max(map(len, pieces)), len(texts)

        def tensor(values: Any, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self._pieces = tensor([piece + [0] * (wide - len(piece)) for piece in pieces])
        self._pieces_length = tensor([len(piece) for piece in pieces])
        self._ends = tensor(sorted(ends[0] | ends[1]))
        self._is_end = tensor([[token in each for token in sorted(ends[0] | ends[1])] for each in ends], torch.bool)
        # Whether a text ends with a question, and with an answer.
        self._last = tensor([turns is None, turns is None or not turns.question_ends], torch.bool)
        self.tokens = tensor([text.tokens + [0] * (length + wide - len(text.tokens)) for text in texts])
        self._roles = torch.zeros_like(self.tokens, dtype=torch.bool)
        self._given = tensor([len(text.tokens) for text in texts])  # where draws go on
        self._lengths = tensor([length] * count)  # where a text ends
        self._answers = tensor([text.answers for text in texts], torch.bool)
        self._begins = torch.ones_like(self._answers)
        self._temperatures = tensor([text.temperature for text in texts], torch.double)
        least = min(len(text.tokens) for text in texts)
        self._uniforms = torch.stack([torch.from_numpy(text.uniforms(length - least)) for text in texts]).to(device)
        self._drawn = torch.zeros_like(self._given)

    def put(self, position: int, logits: Tensor) -> None:
        """Put the tokens of a position where they are not given.

        Args:
            position: Behind what was read.
            logits: [rows, vocab], changed in place.
        """
        free = (self._given <= position) & (position < self._lengths)
        kind = self._answers.long()
        empty = self._begins[:, None] & self._is_end[kind]  # a turn is to have something in it
        logits[:, self._ends] = logits[:, self._ends].masked_fill(empty, -torch.inf)
        temperatures = torch.where(self._answers, self._temperatures, 1.0)
        uniforms = self._uniforms.gather(1, self._drawn[:, None].clamp(max=self._uniforms.shape[1] - 1))
        token = choose(logits, temperatures, uniforms, self._recipe)
        self._drawn += free
        end = free & ((token[:, None] == self._ends) & self._is_end[kind]).any(1)
        self.tokens[:, position] = torch.where(free, token, self.tokens[:, position])
        self._roles[:, position] |= free & self._answers
        pieces, lengths = self._pieces[kind], self._pieces_length[kind]
        if wide := pieces.shape[1]:
            put = end[:, None] & (torch.arange(wide, device=end.device) < lengths[:, None])
            there = self.tokens[:, position : position + wide]
            self._roles[:, position] &= ~end | (pieces[:, 0] == token)  # the template's end in the place of another
            there.copy_(torch.where(put, pieces, there))
            self._given = torch.where(end, position + lengths, self._given)
        stop = position + lengths.clamp(min=1)
        self._lengths = torch.where(end & self._last[kind], torch.minimum(stop, self._lengths), self._lengths)
        self._begins = torch.where(free, end, self._begins)
        self._answers = self._answers ^ end

    def ended(self, length: int) -> bool:
        """Tell whether no text is longer."""
        return bool((self._lengths <= length).all())

    def hand_back(self, texts: list[Writing]) -> None:
        """Give the texts what was written of them."""
        tokens, roles, lengths = self.tokens.cpu().numpy(), self._roles.cpu().numpy(), self._lengths.tolist()
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            text.tokens, text.roles = tokens[row, :length].tolist(), roles[row, :length].astype(int).tolist()


def choose(logits: Tensor, temperatures: Tensor, uniforms: Tensor, recipe: Recipe) -> Tensor:
    """Plain decoding's choice in every row, as `dynamo_train.writing.choose` has it in one.

    Args:
        logits: [rows, vocab].
        temperatures: 0 for the likeliest token [rows].
        uniforms: In [0, 1) [rows, 1].
        recipe: Its top-k and top-p.

    Returns:
        Tokens [rows].
    """
    values, ids = logits.topk(recipe.top_k)
    greedy = temperatures[:, None] == 0
    weights = ((values - values[:, :1]).double() / torch.where(greedy, 1.0, temperatures[:, None])).exp()
    cumulative = weights.cumsum(1)
    # A token belongs to the nucleus while those before it have not reached top_p: so at least one does.
    last = (cumulative < recipe.top_p * cumulative[:, -1:]).sum(1, keepdim=True).clamp(max=recipe.top_k - 1)
    place = (cumulative <= uniforms * cumulative.gather(1, last)).sum(1, keepdim=True).minimum(last)
    return ids.gather(1, place.masked_fill(greedy, 0))[:, 0]
