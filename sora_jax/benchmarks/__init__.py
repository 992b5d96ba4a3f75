"""Benchmarks with published tables: each trains and measures from nothing, and puts its row among theirs."""
