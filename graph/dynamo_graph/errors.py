"""What can go wrong on the way to a bundle."""


class WriteError(Exception):
    """A bundle that cannot be written as asked; its message is one clear line for the user."""
