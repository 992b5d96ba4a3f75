"""Serve the model that comes with the package, as a Space of Hugging Face starts it."""

from sora_jax import cli

raise SystemExit(cli.main(["demo", "--host=0.0.0.0", "--port=7860", "--queue=8", "--max-steps=50", "--max-seconds=60"]))
