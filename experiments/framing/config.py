"""Train on wide and tall clips of the world as they are, and on their square crops, with the quickstart's autoencoder.

    sora-jax data build --config=experiments/framing/config.py:native --out=data/framing_native
    sora-jax data encode --autoencoder=runs/quickstart/autoencoder \\
        --data=data/framing_native --out=data/framing_native_latents
    sora-jax train --config=experiments/framing/config.py:transformer --workdir=runs/framing_native \\
        --config.latents=data/framing_native_latents

The same with `square` for `native`; then experiments/framing/measure.py. Results: experiments/framing/README.md.
"""

import dataclasses

from sora_jax.config import choose, from_dict, load, to_config_dict
from sora_jax.data.building.prepare import BuildConfig
from sora_jax.data.sources import SourceConfig
from sora_jax.quickstart import QuickstartConfig, default_config


def get_config(variant: str = "transformer"):
    variants = {"transformer": transformer, "native": lambda: data("native"), "square": lambda: data("square")}
    return choose("variant of experiments/framing/config.py", variant or "transformer", variants)()


def world():
    """Return the quickstart's world without its square clips."""
    config = from_dict(QuickstartConfig, load(default_config())).world
    return dataclasses.replace(config, sizes=((24, 36), (36, 24)), extra_captions=())


def data(framing):
    sources = (SourceConfig("world", limit=3000, world=world(), world_held_out=300),)
    return to_config_dict(BuildConfig(sources=sources, max_frames=9, time_factor=2, multiple=12, framing=framing))


def transformer():
    config = load(default_config()).transformer
    config.captions = "first"
    config.preview.prompts = ()
    config.preview.sizes = ()
    return config
