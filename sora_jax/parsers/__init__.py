"""Parsers of the commands of `sora-jax`; each imports what it runs when it runs."""
