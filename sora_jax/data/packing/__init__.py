"""Pack: from lengths to packs."""
