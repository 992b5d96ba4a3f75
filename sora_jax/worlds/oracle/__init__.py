"""The oracle: read a clip of the embedded world from its pixels alone, and compare it with a prompt."""

from sora_jax.worlds.oracle.agreement import Agreement, agree, agreement
from sora_jax.worlds.oracle.frames import FrameReading, read_frames
from sora_jax.worlds.oracle.reading import Reading, ShapeReading, read

__all__ = ["Agreement", "FrameReading", "Reading", "ShapeReading", "agree", "agreement", "read", "read_frames"]
