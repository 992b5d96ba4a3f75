"""Measure generated clips and training runs."""
