"""The one error a user of a checkpoint sees."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or of a kind that is not supported; one clear line."""
