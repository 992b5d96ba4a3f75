"""Train the quickstart's transformer on captions of one form, on the clips of a finished quickstart.

    sora-jax train --config=experiments/recaption/config.py:full --workdir=runs/recaption_full
    sora-jax train --config=experiments/recaption/config.py:short --workdir=runs/recaption_short

full: captions with the background. short: captions of shapes alone. Time: experiments/recaption/README.md.
"""

from sora_jax.config import choose, load
from sora_jax.quickstart import default_config

CAPTIONS = {"full": "original=1", "short": "short=1"}


def get_config(variant: str = "full"):
    config = load(default_config()).transformer
    config.captions = choose("variant of experiments/recaption/config.py", variant or "full", CAPTIONS)
    config.latents = "runs/quickstart/latents"
    config.preview.prompts = ()
    config.preview.sizes = ()
    return config
