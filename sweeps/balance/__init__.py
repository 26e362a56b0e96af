"""Balance: whether all experts are in use after a training script that knows none.

The models are loaded from what `moeify convert` wrote. Who trains one must end with its experts in use, or must have
been told once why not.
"""
