"""Text to video in functional JAX: packed spacetime patches of any size, from a laptop to a pod."""

__version__ = "0.1.0"
