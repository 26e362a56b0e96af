"""Training a converted model in the user's own script: losses, statistics, capacity, freezing, optimizers."""
