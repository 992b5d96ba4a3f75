"""Clips, captions, caches and packs: everything on the host, in NumPy."""
