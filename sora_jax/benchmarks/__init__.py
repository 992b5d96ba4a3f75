"""Benchmarks with published tables: each trains and evaluates from nothing, by one command."""
