"""The one exception of the export stage."""

from dynamo_graph.errors import WriteError


class ExportError(WriteError):
    """A model, an argument or a destination that cannot be exported; its message is one clear line for the user."""
