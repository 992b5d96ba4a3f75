"""Run `sora-jax` as `python -m sora_jax`."""

import sys

from sora_jax.cli import console

if __name__ == "__main__":
    sys.exit(console())
