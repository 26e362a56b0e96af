"""Turning a model, or the parts of a model, into an FX graph without weights."""
