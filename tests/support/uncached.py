"""What a bundle says when nothing is cached: the reference for whatever is."""

import numpy as np

from dynamo_runtime import Engine


def uncached_logits(engine: Engine, tokens: list[int]) -> np.ndarray:
    """Last rows of all heads, computed from nothing."""
    engine.reset()
    step = engine.session.step(tokens)
    return np.stack([step.logits(head)[-1] for head in range(1, engine.bundle.topology.n_heads + 1)])
