"""Build a dataset from the entries of sources."""
