"""From what the passes found to a plan: where, which, and at what cost."""
