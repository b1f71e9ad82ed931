"""ONNX files and onnxruntime."""
