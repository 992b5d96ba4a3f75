"""Scene cuts, found by PySceneDetect's content detector (extra `scenes`)."""

from collections.abc import Iterable

import numpy as np

from sora_jax.errors import UserError, install_command

SIDE = 128  # pixels of the longer side of the frames that are compared
THRESHOLD = 27.0  # PySceneDetect's default for its content detector


def cut_moments(frames: Iterable[tuple[float, np.ndarray]]) -> list[float]:
    """Return the times of the frames that are the first of a new scene.

    frames: pairs (seconds, uint8 (H, W, 3)), all of one size. Raises UserError where PySceneDetect is not installed.
    """
    try:
        from scenedetect import FrameTimecode
        from scenedetect.detectors import ContentDetector
    except ImportError as error:
        how = install_command("scenes")
        raise UserError(f"--cuts needs PySceneDetect, which is not installed: {how}") from error
    detector, moments = ContentDetector(threshold=THRESHOLD, min_scene_len=1), []
    for number, (time, frame) in enumerate(frames):
        # Only the order of the frames counts; the rate is one that the library takes.
        if detector.process_frame(FrameTimecode(number, 25.0), np.ascontiguousarray(frame[:, :, ::-1])):
            moments.append(time)
    return moments


def longest_run(grid: np.ndarray, moments: list[float], slack: float) -> slice:
    """Return the first longest part of the ascending `grid` between two cuts. slack: seconds of rounding."""
    inner = np.searchsorted(grid, np.asarray(moments) - slack)
    edges = np.unique([0, *inner, len(grid)])
    longest = int(np.diff(edges).argmax())
    return slice(int(edges[longest]), int(edges[longest + 1]))


def small_size(height: int, width: int) -> tuple[int, int]:
    """Return the size in which frames are compared."""
    scale = min(1.0, SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
