"""Training: a tokenizer and a base from scratch, drafters on a base, co-occurrence counts."""

from .errors import TrainingError

__all__ = ["TrainingError"]
