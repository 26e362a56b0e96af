"""`python -m moeify` is the same program as `moeify`."""

from moeify.cli import main

main()
