"""Export to ONNX: a PyTorch model in, a file that ONNX Runtime runs sparsely out, with its proof."""
