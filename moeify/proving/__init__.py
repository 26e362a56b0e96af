"""The proof of a conversion: outputs side by side, of whole models or of a few layers, and perplexity."""
