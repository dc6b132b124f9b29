"""Names the machine a figure was measured on."""

from dynamo_runtime.device.inspection import describe_processor as describe_machine

__all__ = ["describe_machine"]
