"""From a PyTorch model to an ONNX graph whose experts are opaque nodes.

The nodes `moeify::Experts` and `moeify::GroupedLinear` keep the inputs of the torch operators. The lowering replaces
them; no file holds them.
"""

DOMAIN = "moeify"
EXPERTS, GROUPED_LINEAR = "Experts", "GroupedLinear"
OPSET = 20  # of the standard operators: the first with Gelu
