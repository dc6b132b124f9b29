"""Names the machine a figure was measured on."""

from dynamo_runtime.profiling.device import describe_processor as describe_machine

__all__ = ["describe_machine"]
