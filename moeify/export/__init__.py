"""Export to ONNX: a PyTorch model in, a file that ONNX Runtime runs sparsely out, with its proof."""

from moeify.export.onnx_file import OnnxReport, export_onnx

__all__ = ["OnnxReport", "export_onnx"]
