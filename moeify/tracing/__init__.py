"""A model, a configuration or a part of a model becomes an FX graph, without weights."""
