"""ONNX plus data to INT8 ONNX."""
