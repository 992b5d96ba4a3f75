"""Layers as functions of parameters."""
