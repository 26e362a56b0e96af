"""The streamed applier: checkpoint to checkpoint, in the memory of a few tensors."""
