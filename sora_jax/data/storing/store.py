"""The stores that packing reads: clips by index, with columns of what must be known of all of them to plan packs."""

from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.manifest import Dataset

ClipStore = LatentCache | Dataset
