"""Names of the graph's inputs and outputs: the contract between host and device (docs/bundle.md)."""

from collections.abc import Iterable

INPUT_IDS, ATTENTION_MASK = "input_ids", "attention_mask"
KEPT_ROWS, HEAD_ROWS = "num_logits_to_keep", "head_rows"
LOGITS, TOPK_LOGITS, TOPK_IDS = "logits", "topk_logits", "topk_ids"
GATE = "gate"
HEAD_STATES, DRAFT_STATES, PREVIOUS, DRAFT_PART = "head_states", "draft_states", "previous_tokens", "draft_part"
VOCABULARY = "draft_vocabulary"
SKIPPED, PENULTIMATE = "skipped_states", "penultimate_states"
PAST, PRESENT = "past_key_values", "present"
OUTPUTS = (LOGITS, TOPK_LOGITS, TOPK_IDS)
"""What every graph puts out besides its caches."""


def caches(prefix: str, layers: Iterable[int]) -> list[str]:
    """Return the names of the keys and values of some layers, "past_key_values.0.key" and so on.

    Args:
        prefix: `PAST` or `PRESENT`.
        layers: Their numbers.
    """
    return [f"{prefix}.{layer}.{part}" for layer in layers for part in ("key", "value")]
