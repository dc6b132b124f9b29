"""Some tests import onnxruntime themselves: it is to be as quiet as with the runtime."""

from dynamo_runtime.quiet import hush

hush()
