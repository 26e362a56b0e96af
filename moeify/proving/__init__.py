"""The proof of a conversion: logits side by side, whole or on a slice, and perplexity."""
