"""Programs that run over every model type of transformers, or over the sources, and write the pages in docs/."""
