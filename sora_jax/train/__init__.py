"""Training: a pure step, and the host code around it."""
