"""The one error a user of the training package sees."""


class TrainingError(ValueError):
    """Something about the data, the arguments or an earlier run that training cannot go on with; one line."""
