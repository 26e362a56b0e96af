"""Reading and writing checkpoints in bounded memory; nothing here knows what a Mixture-of-Experts is."""
