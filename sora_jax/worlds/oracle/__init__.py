"""The oracle: reads a clip of the embedded world back from its pixels alone, and compares it with a prompt."""

from sora_jax.worlds.oracle.agreement import Agreement, agree, agreement
from sora_jax.worlds.oracle.frames import FrameReading, read_frames
from sora_jax.worlds.oracle.reading import Reading, ShapeReading, read

__all__ = ["Agreement", "FrameReading", "Reading", "ShapeReading", "agree", "agreement", "read", "read_frames"]
