"""From opaque expert nodes to what a target runs."""
