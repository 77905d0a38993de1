"""Saves students as files: safetensors and ONNX."""
