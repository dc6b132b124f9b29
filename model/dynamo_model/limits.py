"""How large a drafter may be."""

MAX_HEADS = 8
"""Tokens that parallel heads or a joint head predict in one pass, the base's own among them."""

MAX_RANK = 32
"""Components of a joint head."""

MAX_LOOK_AHEAD = 16
"""Look-ahead embeddings."""
