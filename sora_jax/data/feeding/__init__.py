"""Feed: from packs to batches, through Grain."""
