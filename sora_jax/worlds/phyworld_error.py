"""Read Phyworld's clips back: positions of the balls from pixels, and the error of their velocities.

Kang et al. 2411.02385 publish one number for a model: how far the velocities in its clips are from the true ones. Three
definitions of it are here. Their figures follow `published` (github.com/phyworld/phyworld, `evaluate.py`); the paper's
text has `printed`; both look at pixels above a threshold and misjudge the scale of a frame, so that true clips have an
error of about .01. `unbiased` has none of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sora_jax.worlds.phyworld import FRAMES, GIVEN_FRAMES, STEP, STRIDE, WORLD, Ball, PhyworldConfig, Truth, truth

_THRESHOLD = 127
_OWN = (("red", 0), ("blue", 2))  # the channel that a colour alone has beside white
_LEAST = 0.25  # of its true area must be seen of a ball, or it is lost
_FADED = 0.2  # relative error of a ball's area, over the frames that are measured, at which it has faded
_PARSED = (128, 256)  # the smallest frames that the published parser looks at, and the size of its own
_DEFAULT_X = {"red": 0.0, "blue": WORLD}  # where the published parser puts a ball that it does not find, of two
FEWEST_FRAMES = 3


@dataclass(frozen=True)
class VelocityError:
    """Errors of the velocities of one clip, in units of the world a second, and what is wrong with its balls.

    published: |mean over frames of (v - v_true)|, with the published parser. printed: mean over frames of |v - v_true|,
    with the same. unbiased: difference of the slopes of lines through the positions, with the unbiased parser. Each is
    a mean over balls; vertical and horizontal errors of a parabola add up, elsewhere only x counts. NaN where less than
    three frames can be measured. lost: a ball is not seen in a frame that should show it. faded: a ball has not the
    area that it should have.
    """

    published: float
    printed: float
    unbiased: float
    lost: bool = False
    faded: bool = False


@dataclass(frozen=True)
class Sight:
    """What an unbiased look sees of N balls in T frames, in units of the world: centres (x, y) and areas, NaN if lost.

    The area is that of all colour near the ball, so it shrinks with the ball or with its colour.
    """

    positions_TN2: np.ndarray
    areas_TN: np.ndarray


@dataclass(frozen=True)
class Summary:
    """Means over clips: the errors of those that can be measured, and shares of all clips."""

    clips: int
    published: float
    printed: float
    unbiased: float
    lost: float
    faded: float
    unmeasured: float


def measure(config: PhyworldConfig, index: int, frames: np.ndarray) -> VelocityError:
    """Compare a clip (T, H, W, 3) uint8 with what happens in clip `index`.

    Frames from the fourth on are measured, in which the balls are wholly inside; in a collision those after the hit.
    """
    true = truth(config, index)
    chosen = measured_frames(true)
    if len(chosen) < FEWEST_FRAMES:
        return VelocityError(np.nan, np.nan, np.nan)
    colours = [ball.colour for ball in true.balls]
    axes = [0, 1] if config.scenario == "parabola" else [0]
    places_FN2 = true.positions_TN2[chosen]
    off_FN = (_velocities(published_positions(config, frames[chosen], colours)) - _velocities(places_FN2))[..., axes]
    seen = look(config, frames[chosen], colours)
    slopes_N2 = slope(seen.positions_TN2) - slope(np.where(np.isnan(seen.positions_TN2), np.nan, places_FN2))
    shares_FN = seen.areas_TN / true_areas(true)
    missing_FN = np.isnan(shares_FN)
    ink_N = np.where(missing_FN, 0, shares_FN).sum(0) / np.maximum((~missing_FN).sum(0), 1)
    return VelocityError(
        published=float(np.abs(_mean_of_known(off_FN)).sum(-1).mean()),
        printed=float(_mean_of_known(np.abs(off_FN)).sum(-1).mean()),
        unbiased=float(np.abs(slopes_N2[:, axes]).sum(-1).mean()),
        lost=bool((missing_FN | (shares_FN < _LEAST)).any()),
        faded=bool(((np.abs(ink_N - 1) > _FADED) & ~missing_FN.all(0)).any()),
    )


def _mean_of_known(off_FN: np.ndarray) -> np.ndarray:
    """Average over frames; those before a ball is first found have no height (NaN) and, as published, do not count."""
    known_FN = ~np.isnan(off_FN)
    return np.where(known_FN.any(0), np.where(known_FN, off_FN, 0).sum(0) / np.maximum(known_FN.sum(0), 1), np.nan)


def summarise(errors: Iterable[VelocityError]) -> Summary:
    """Average errors of clips."""
    found = list(errors)
    table = np.array([(e.published, e.printed, e.unbiased) for e in found]).reshape(-1, 3)
    lost = np.array([e.lost for e in found], bool)
    shares = [np.mean(marks) for marks in (lost, [e.faded for e in found], np.isnan(table[:, 1]) & ~lost)]
    # A ball that is hardly ever seen has published errors but no line through its positions.
    means = [column[~np.isnan(column)].mean() if not np.isnan(column).all() else np.nan for column in table.T]
    return Summary(len(found), *map(float, (*means, *shares)))


def measured_frames(true: Truth) -> np.ndarray:
    """Return the frames in which velocities are measured."""
    chosen = true.inside_T.copy()
    chosen[: max(GIVEN_FRAMES, true.hit or 0)] = False
    chosen[FRAMES:] = False
    return np.flatnonzero(chosen)


def is_counted(true: Truth) -> bool:
    """Return False for clips that the published evaluation leaves out: their balls are so small that they disappear."""
    return bool((true.radii_N >= 0.6).all() if len(true.balls) == 1 else (true.radii_N > 0.5).all())


def true_areas(true: Truth) -> np.ndarray:
    """Return the area of each ball or square."""
    return np.array([(4.0 if b.figure == "square" else np.pi) * b.radius**2 for b in true.balls])


def published_positions(config: PhyworldConfig, frames: np.ndarray, colours: Sequence[str]) -> np.ndarray:
    """Return centres (T, N, 2) as the published parser reads them, for frames (T, H, W, 3) uint8.

    It takes the mean index of the pixels whose colour is nearer to the ball's than to others, over the width. Frames
    smaller than 128 pixels, the smallest that it was made for, are enlarged to 256. Its lengths are 255/256 of the true
    ones: on frames that have not the cause, the published drawing, they are shortened, so that errors compare.
    """
    small = frames.shape[2] < _PARSED[0]
    frames = enlarge(frames, _PARSED[1]) if small else frames
    size, found = frames.shape[2], np.empty((len(frames), len(colours), 2))
    for n, colour in enumerate(colours):
        own, other = (0, 2) if colour == "red" else (2, 0)
        mask = (frames[..., own] > _THRESHOLD) & (frames[..., 1] < _THRESHOLD) & (frames[..., other] < _THRESHOLD)
        x, y = _centroids(mask)
        missing = ~mask.any((1, 2))
        # As published: where it is missing, the ball is at the edge, on the height of the frame before.
        x = np.where(missing, (WORLD if len(colours) == 1 else _DEFAULT_X[colour]) / WORLD * size, x)
        last = np.maximum.accumulate(np.where(missing, -1, np.arange(len(frames))))
        y = np.where(last >= 0, (frames.shape[1] - 1 - y)[last], np.nan)
        found[:, n] = np.stack([x, y], -1) / size * WORLD
    return found * (255 / 256 if config.drawing == "area" else 1.0)


def enlarge(frames: np.ndarray, size: int) -> np.ndarray:
    """Enlarge square frames (T, S, S, 3) to (T, size, size, 3), float32, by cubic convolution (Keys 1981)."""
    old = frames.shape[1]
    places = (np.arange(size)[:, None] + 0.5) * old / size - 0.5
    taps = np.floor(places).astype(int) + np.arange(-1, 3)
    away = np.abs(places - taps)
    near, far = 1.5 * away**3 - 2.5 * away**2 + 1, -0.5 * away**3 + 2.5 * away**2 - 4 * away + 2
    weights = np.where(away <= 1, near, far).astype(np.float32)
    taps = np.clip(taps, 0, old - 1)
    # Sums of shifted copies: a product of matrices would wait for other threads where the machine is shared.
    tall = sum(frames[:, taps[:, k]] * weights[:, k, None, None] for k in range(4))
    return sum(tall[:, :, taps[:, k]] * weights[:, k, None] for k in range(4))


def look(config: PhyworldConfig, frames: np.ndarray, colours: Sequence[str]) -> Sight:
    """Look at frames (T, H, W, 3) uint8 for a ball of each colour: centroids of all colour near it.

    A pixel between red, blue and white is a mixture; its shares of red and of blue are exact. Colour far from the ball,
    as generated clips have it, does not count.
    """
    height, width = frames.shape[1:3]
    scale = (WORLD / width) ** 2
    green = frames[..., 1].astype(np.float64)
    positions, areas = np.full((len(frames), len(colours), 2), np.nan), np.full((len(frames), len(colours)), np.nan)
    rows, columns = np.arange(height)[:, None], np.arange(width)
    for n, colour in enumerate(colours):
        share = np.clip((frames[..., 0 if colour == "red" else 2] - green) / 255, 0, 1)
        core = share >= 0.5
        count = core.sum((1, 2))
        (x, y), seen = _centroids(core), count > 0
        reach = (np.sqrt(count / np.pi) + 2.0)[:, None, None]
        for _ in range(2):
            near = (columns - x[:, None, None]) ** 2 + (rows - y[:, None, None]) ** 2 <= reach**2
            weights = np.where(near, share, 0.0)
            x, y = _centroids(weights)
        positions[seen, n] = _to_world(config, x, y, width)[seen]
        areas[seen, n] = weights.sum((1, 2))[seen] * scale
    return Sight(positions, areas)


def see_ball(config: PhyworldConfig, frames: np.ndarray) -> Ball | None:
    """Return the ball that a clip (T, H, W, 3) uint8 of one ball ends with, whatever it began with; None without one.

    Its speed is that over the predicted frames that show it wholly inside, wherever the true ball is by then; the rest
    is read in the last third of these.
    """
    shown = frames[GIVEN_FRAMES:FRAMES].astype(float)
    inks = {c: np.clip((shown[..., own] - shown[..., 1]) / 255, 0, 1) for c, own in _OWN}
    whole = np.flatnonzero(np.logical_or.reduce([_is_whole(ink) for ink in inks.values()]))
    last = whole[-len(whole) // 3 :]
    colour = max(inks, key=lambda name: inks[name][last].sum())
    whole_T = _is_whole(inks[colour])
    seen = look(config, frames[GIVEN_FRAMES:FRAMES], [colour])
    speed = float(slope(np.where(whole_T[:, None, None], seen.positions_TN2, np.nan))[0, 0])
    last = last[whole_T[last]]
    if np.isnan(speed) or not len(last):
        return None
    area = float(np.median(seen.areas_TN[last, 0]))
    figure = "square" if np.median([_squareness(ink) for ink in inks[colour][last]]) > 5 / 6 else "ball"
    return Ball(float(np.sqrt(area / (4 if figure == "square" else np.pi))), speed, colour, figure)


def _is_whole(ink_THW: np.ndarray) -> np.ndarray:
    """Return True for the frames that show a ball, no part of which is outside: (T,)."""
    core = ink_THW >= 0.5
    inner = core[:, 1:-1, 1:-1].sum((1, 2))
    return (inner > 0) & (inner == core.sum((1, 2)))


def _squareness(ink_HW: np.ndarray) -> float:
    """Return <x^2 y^2> / (<x^2> <y^2>) about the centroid: 2/3 for a disc, 1 for an upright square."""
    weights = np.where(ink_HW > 0.05, ink_HW, 0.0)[None]
    (x,), (y,) = _centroids(weights)
    x2, y2 = (np.arange(ink_HW.shape[1]) - x) ** 2, ((np.arange(ink_HW.shape[0]) - y) ** 2)[:, None]
    total = max(weights.sum(), 1e-9)
    mean = lambda values: float((weights[0] * values).sum() / total)  # noqa: E731
    return mean(x2 * y2) / max(mean(x2) * mean(y2), 1e-9)


def slope(positions_TN2: np.ndarray) -> np.ndarray:
    """Return the slope (N, 2), a second, of the line of least squares through positions; NaN frames are left out."""
    found = ~np.isnan(positions_TN2)
    time = np.broadcast_to(STEP * STRIDE * np.arange(len(positions_TN2))[:, None, None], positions_TN2.shape)
    count = np.maximum(found.sum(0), 1)
    centred = np.where(found, time - np.where(found, time, 0).sum(0) / count, 0.0)
    spread = (centred**2).sum(0)
    known = found.sum(0) >= FEWEST_FRAMES
    return np.where(known, (centred * np.nan_to_num(positions_TN2)).sum(0) / np.where(known, spread, 1.0), np.nan)


def _velocities(positions_TN2: np.ndarray) -> np.ndarray:
    return np.diff(positions_TN2, axis=0) / (STEP * STRIDE)


def _centroids(weights_THW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the column and the row of the centroid of each frame, in indices; 0 where all weights are 0."""
    total = np.maximum(weights_THW.sum((1, 2)), 1e-9)
    x = (weights_THW.sum(1) * np.arange(weights_THW.shape[2])).sum(1) / total
    return x, (weights_THW.sum(2) * np.arange(weights_THW.shape[1])).sum(1) / total


def _to_world(config: PhyworldConfig, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """Return places (x, y), y up, of indices of columns and rows, by the drawing that the clips are made with."""
    if config.drawing == "published":
        block = 256 / size
        x, y = ((block * z + (block - 1) / 2) / 255 for z in (x, y))
    else:
        x, y = ((z + 0.5) / size for z in (x, y))
    return WORLD * np.stack([x, 1 - y], -1)
