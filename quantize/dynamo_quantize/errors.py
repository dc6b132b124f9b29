"""What can go wrong on the way from one bundle to another."""

from dynamo_graph.errors import WriteError


class QuantizeError(WriteError):
    """A bundle, an argument or a destination that cannot be quantized, or a result that fails its gates."""
