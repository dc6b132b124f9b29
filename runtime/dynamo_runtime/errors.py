"""Errors a user can cause: every one is a single clear line, and a non-zero exit at the command line."""

_SHOWN_CHARACTERS = 60


def printable(text: str) -> str:
    """Return a text for terminals.

    Names of bundles and files may hold anything, and what moves a cursor is shown escaped.
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class DynamoError(Exception):
    """Base class of the runtime's user errors; its message is one line."""

    def __str__(self) -> str:
        """Return the message on one line of printable characters, whatever a library or a file's name put into it."""
        return printable(" ".join(super().__str__().split()))


class BundleError(DynamoError):
    """The bundle is missing, incomplete, changed, or does not keep the contract between host and device."""


class ProviderError(DynamoError):
    """onnxruntime, or the execution provider asked for, is not usable on this machine."""


class ParameterError(DynamoError):
    """A generation parameter is not finite, out of range, or does not fit this bundle."""


class PromptError(DynamoError):
    """The prompt is empty, too long, or not text; or messages do not make one."""


class ProfileError(DynamoError):
    """A profile is missing, unreadable, or cannot be made."""


class OutputError(DynamoError):
    """A file of results cannot be written where it was asked for."""


class EngineError(DynamoError, RuntimeError):
    """An engine is closed, at work for another thread, or has begun something else."""


def shown(value: object) -> str:
    """Return a value as an error may show it, which is short however long the value is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        return f"a {type(value).__name__} too long to be shown"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
