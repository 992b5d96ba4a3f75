"""What a run would need of accelerators that are not here: compiled ahead of time, counted, and told."""
