"""Unmodified releases of engines on native checkpoints that moeify wrote: do they compute what transformers computes?

Each `with_*` module runs one engine. It imports nothing of the project but `program` and `stand_ins`, so that the
engine's own environment can run it.
"""
