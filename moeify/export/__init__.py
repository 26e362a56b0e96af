"""Export to ONNX: a PyTorch model in, a file that ONNX Runtime runs sparsely out, with its proof."""

from moeify.export.onnx_file import export_onnx
from moeify.export.report import OnnxReport

__all__ = ["OnnxReport", "export_onnx"]
