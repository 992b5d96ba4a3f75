"""Draw the page of pictures of an evaluation: generated clips beside real ones, and the curves against time."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.data.viewing.sheets import contact_sheet, strip
from sora_jax.evaluate.consistency import Consistency, Measured
from sora_jax.evaluate.world import in_words

SHOWN = 10  # clips
FRAMES = 9  # frames of each, at most
WIDEST = 96  # pixels, about, of a frame on the page
TITLES = {
    "agreement": "shapes of the prompt that a frame shows",
    "identity": "shapes of frame 0 that a frame shows",
    "shape": "clips with the very shapes of frame 0",
}
LINES: dict[str, dict[str, Any]] = {
    "generated": {"color": "tab:red"},
    "autoencoder": {"color": "tab:orange", "linestyle": "--", "zorder": 3},  # seen over that of the real clips
    "real": {"color": "tab:blue"},
}


def draw_page(
    prompts: Sequence[str],
    generated: Sequence[np.ndarray],
    real: Sequence[np.ndarray],
    found: Sequence[Measured],
    columns: Mapping[str, Consistency],
) -> np.ndarray:
    """Draw strips of generated above real clips over what the oracle reads, and the curves; uint8 (H, W, 3)."""
    strips, titles = [], []
    for place in shown_places(found):
        pair = generated[place], real[place]
        strips.append(_stacked([strip(clip, FRAMES, _scale(clip)) for clip in pair])[None])
        titles.append(_title(prompts[place], *pair, oracle=found[place].agreement is not None))
    sheet = contact_sheet(strips, titles, columns=2, shown=1)
    if not any(column.curves["identity"] for column in columns.values()):
        return sheet
    return _stacked([draw_curves(columns, sheet.shape[1]), sheet])


def shown_places(found: Sequence[Measured]) -> list[int]:
    """Choose the clips to show: half of them with a pass, where there are so many, and the others evenly spread."""
    passes = [place for place, m in enumerate(found) if m.passes][: SHOWN // 2]
    others = [place for place, m in enumerate(found) if not m.passes]
    most = SHOWN - len(passes)
    return passes + [others[i] for i in np.unique(np.linspace(0, len(others) - 1, most).astype(int)) if others]


def _scale(clip: np.ndarray) -> int:
    return max(1, round(WIDEST / clip.shape[2]))


def _title(prompt: str, generated: np.ndarray, real: np.ndarray, oracle: bool) -> str:
    if not oracle:
        return f"{prompt} (generated above, real below)"
    return f"{prompt} | generated, above: {in_words(generated)} | real, below: {in_words(real)}"


def _stacked(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Place pictures (H, W, 3) below each other on white."""
    width = max(picture.shape[1] for picture in pictures)
    pad = [((0, 3), (0, width - picture.shape[1]), (0, 0)) for picture in pictures]
    return np.concatenate([np.pad(p, way, constant_values=255) for p, way in zip(pictures, pad, strict=True)])


def draw_curves(columns: Mapping[str, Consistency], width: int) -> np.ndarray:
    """Draw each curve against the frame number in a panel, uint8 (H, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, 2.6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for panel, name in zip(figure.subplots(1, len(TITLES)), TITLES, strict=True):
        _draw(panel, name, columns)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw(panel: Any, name: str, columns: Mapping[str, Consistency]) -> None:
    for column, found in columns.items():
        panel.plot(found.curves[name], marker=".", label=column, **LINES[column])
    panel.set_ylim(-0.03, 1.03)
    panel.set_title(TITLES[name], fontsize=10)
    panel.set_xlabel("frame", fontsize=9)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)
