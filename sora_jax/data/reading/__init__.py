"""Read a file into frames."""
