"""How good the generated clips are."""
