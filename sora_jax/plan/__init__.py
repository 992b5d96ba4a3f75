"""What a run would need of TPUs that are not here: compiled ahead of time, counted, and told."""
