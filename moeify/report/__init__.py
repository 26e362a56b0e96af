"""Pages of what was done and of what a model does: `collect` gathers data, `render` makes a page of nothing else."""
