"""Errors of an evaluation that a user can cause."""

from dynamo_runtime.errors import DynamoError


class EvaluationError(DynamoError):
    """A results file, an argument, a judge or an extra is missing, does not fit, or cannot be used."""
