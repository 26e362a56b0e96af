"""What FindFFN knows: operators, projections, activations, residual streams, and why a match stops."""
