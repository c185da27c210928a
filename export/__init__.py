"""From a trained checkpoint to ONNX graphs and a bundle. Needs torch and onnx; runs on the workstation."""
