"""What exporting and quantizing stand on: ONNX graphs read, walked, changed and written, and bundles put in place."""
