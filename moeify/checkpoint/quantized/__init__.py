"""Checkpoints whose weights are quantized, one storage format a file: each says what a weight is, and how to get it."""
