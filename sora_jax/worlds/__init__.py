"""The embedded world: captioned clips of moving shapes, drawn on demand."""

from sora_jax.worlds.scenes import FULL_WORLD, HELD_OUT, WorldConfig, captions_of, clip, scene, split, wanted

__all__ = ["FULL_WORLD", "HELD_OUT", "WorldConfig", "captions_of", "clip", "scene", "split", "wanted"]
