"""Whether converted models end with all experts in use when a script trains them that knows nothing of experts.

The models are loaded from what `moeify convert` wrote. Who trains one must end with its experts in use, or must have
been told once why not.
"""
