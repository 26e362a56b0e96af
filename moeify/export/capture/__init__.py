"""From a PyTorch model to an ONNX graph whose experts are opaque nodes."""
