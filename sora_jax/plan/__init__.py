"""Plan a run for accelerators that are not here: compile ahead of time, count and report."""
