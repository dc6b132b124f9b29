"""The one exception of the export stage."""


class ExportError(Exception):
    """A model, an argument or a target that cannot be exported; its message is one clear line for the user."""
