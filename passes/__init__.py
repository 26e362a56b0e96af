"""Graph passes: a GraphModule in, a GraphModule and what was found or changed out."""
