"""What transformers loads, and what it is told: checkpoints, the moeify format, experts of stock models."""
