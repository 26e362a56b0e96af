"""The native formats that a dense checkpoint can become, as data."""
