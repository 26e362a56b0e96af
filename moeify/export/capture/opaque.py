"""The opaque nodes that stand for experts between the trace and the lowering; no file holds them.

`moeify::Experts` and `moeify::GroupedLinear` keep the inputs of the torch operators.
"""

DOMAIN = "moeify"
EXPERTS = "Experts"
GROUPED_LINEAR = "GroupedLinear"
OPSET = 20  # of the standard operators: the first with Gelu
