"""A plan is carried out: in a module, in a graph, or from checkpoint to checkpoint."""
