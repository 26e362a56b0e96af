"""Unmodified releases of other tools on converted models: what works, what takes a line of code, and what does not.

Each `with_*` module holds the checks of one tool. A check knows transformers' MoE contract and its tool; what it needs
of moeify beyond loading the model is its line of code.
"""
