"""An fp32 bundle plus what its layers really see becomes an INT8 bundle. Needs onnx and onnxruntime, never torch."""
