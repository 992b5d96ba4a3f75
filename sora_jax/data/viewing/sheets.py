"""Show clips as one picture: a strip of frames for each, with its caption below."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sora_jax.data.fit import pad_frames

MARGIN = 6
GAP = 2
FONT_SIZE = 13
NARROWEST = 160  # pixels of a cell, so that its caption can be read
PAGE = 1200  # pixels of a sheet whose cells are as wide as they need
LOWEST = 1.5  # ratio of the heights of the highest and the lowest cell in a row of it


def strip(frames: np.ndarray, shown: int = 4, scale: int = 1) -> np.ndarray:
    """Put `shown` frames of a clip (T, H, W, 3), evenly spread from first to last, side by side; uint8."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, shown).round().astype(int))
    tiles = frames[chosen].repeat(scale, axis=1).repeat(scale, axis=2)
    gap = np.full((tiles.shape[1], GAP, 3), 255, np.uint8)
    return np.concatenate([part for tile in tiles for part in (gap, tile)][1:], axis=1)


def contact_sheet(
    clips: Sequence[np.ndarray], captions: Sequence[str], columns: int | None = 2, scale: int = 1, shown: int = 4
) -> np.ndarray:
    """Draw a white sheet (H, W, 3) uint8 with a cell for each clip: a strip of frames over its wrapped caption.

    Clips uint8 (T, H, W, 3) may differ in every size; `scale` enlarges their pixels; `shown` frames of each are drawn.
    columns: cells in a row, all as wide as the widest; None: each cell is as wide as its strip, and a row has as many
    as fit, so that a later clip may come earlier.
    """
    strips = [strip(clip, shown, scale) for clip in clips]
    widths = [max(NARROWEST, s.shape[1]) for s in strips]
    if columns:
        widths = [max(widths)] * len(widths)
    cells = [_cell(*cell) for cell in zip(strips, captions, widths, strict=True)]
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)] if columns else _fill_rows(cells)
    width = columns * cells[0].shape[1] if columns else max(sum(cell.shape[1] for cell in row) for row in rows)
    return np.concatenate([_row(row, width) for row in rows])


def _fill_rows(cells: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Put each cell into the first row of the page that has room for it and is about as high."""
    rows: list[list[np.ndarray]] = []
    for cell in cells:
        row = next((row for row in rows if _fits([*row, cell])), None)
        if row is None:
            rows.append(row := [])
        row.append(cell)
    return rows


def _fits(row: Sequence[np.ndarray]) -> bool:
    heights = [cell.shape[0] for cell in row]
    return sum(cell.shape[1] for cell in row) <= PAGE and max(heights) <= LOWEST * min(heights)


def grid(clips: Sequence[np.ndarray], columns: int | None = None, gap: int = GAP) -> np.ndarray:
    """Put clips of one size (T, H, W, 3) side by side as one clip, uint8; by default as many columns as rows."""
    columns = columns or math.isqrt(len(clips) - 1) + 1
    padded = [np.pad(clip, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255) for clip in clips]
    padded += [np.full_like(padded[0], 255)] * (-len(clips) % columns)
    rows = [np.concatenate(padded[i : i + columns], axis=2) for i in range(0, len(padded), columns)]
    return np.concatenate(rows, axis=1)[:, :-gap, :-gap]


def gallery(clips: Sequence[np.ndarray], columns: int = 4, scale: int = 3) -> np.ndarray:
    """Put clips of any size side by side as one clip (T, H, W, 3) on white; a shorter clip repeats its last frame."""
    length, height, width = np.max([clip.shape[:3] for clip in clips], axis=0)
    large = []
    for clip in clips:
        down, right = height - clip.shape[1], width - clip.shape[2]
        sides = ((0, 0), (down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0))
        centred = np.pad(pad_frames(clip, length), sides, constant_values=255)
        large.append(centred.repeat(scale, axis=1).repeat(scale, axis=2))
    return grid(large, columns, MARGIN)


def _row(cells: list[np.ndarray], width: int) -> np.ndarray:
    row = np.full((max(cell.shape[0] for cell in cells), width, 3), 255, np.uint8)
    left = 0
    for cell in cells:
        row[: cell.shape[0], left : left + cell.shape[1]] = cell
        left += cell.shape[1]
    return row


def _cell(strip: np.ndarray, caption: str, width: int) -> np.ndarray:
    font = ImageFont.load_default(FONT_SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's own, where it was built with FreeType
    lines = wrap(caption, font, width)
    line_height = sum(font.getmetrics())
    height = strip.shape[0] + GAP + line_height * len(lines)
    cell = Image.new("RGB", (width + 2 * MARGIN, height + 2 * MARGIN), "white")
    cell.paste(Image.fromarray(strip), (MARGIN, MARGIN))
    draw = ImageDraw.Draw(cell)
    for i, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + strip.shape[0] + GAP + i * line_height), line, fill="black", font=font)
    return np.asarray(cell)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Return lines at most `width` pixels wide, broken at spaces and, inside longer words, anywhere."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]
