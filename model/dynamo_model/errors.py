"""The one error a user of a checkpoint sees."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or of a kind that is not supported; one clear line."""


def first_line(error: BaseException) -> str:
    """Return what an error of another library says, on one line and not too long."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return line if len(line) <= 300 else line[:297] + "..."
