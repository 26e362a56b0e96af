"""Exported files in ONNX Runtime. Nothing here needs torch."""
