"""One native format a file: see `moeify/families/base.py`. A file here is found by listing the folder."""
