"""What can go wrong on the way from one bundle to another."""


class WriteError(Exception):
    """A bundle that cannot be written as asked; its message is one clear line for the user."""


class QuantizeError(WriteError):
    """A bundle, an argument or a target that cannot be quantized, or a result that fails its gates."""
