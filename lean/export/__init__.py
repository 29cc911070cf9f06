"""Writing a quantised model as the ONNX files that the CUDA runtime reads, and executing them without a GPU."""
