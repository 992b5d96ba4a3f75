"""Show what a dataset folder holds, in numbers and in pictures (`data inspect`)."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sora_jax.config import check
from sora_jax.data.building.build import reason_kind
from sora_jax.data.packing.advice import advise
from sora_jax.data.packing.packs import PackingConfig
from sora_jax.data.packing.planning import plan
from sora_jax.data.storing.manifest import Dataset, caption_of, evenly_spread
from sora_jax.data.viewing.sheets import contact_sheet
from sora_jax.data.viewing.write import save_png
from sora_jax.files import as_path, replacing

ASPECTS = {"9:21": 9 / 21, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 3 / 4, "1:1": 1.0}
DURATIONS = (1, 2, 4, 8, 16, 32, 60)
CLIPS = 12  # on the contact sheet


class Inspection(NamedTuple):
    """Hold what `inspect` found: counts as a dict, the same as text, and the pictures that it drew."""

    summary: dict
    text: str
    pictures: tuple[Path, ...]


def inspect(
    path: str | Path, pack_length: int | None = None, slots: int = PackingConfig.slots, out: str | Path | None = None
) -> Inspection:
    """Count what a dataset folder holds; the folder is only read.

    Args:
        path: dataset folder.
        pack_length: tokens of the packs whose fill is counted; None: twice those of the longest clip. Captions, which
            training packs beside clips, take no room here.
        slots: most clips in such a pack.
        out: folder for contact_sheet.png, with some of the clips, and histogram.png; None: no pictures.
    """
    dataset = Dataset(path)
    rows = dataset.rows()
    videos = [row for row in rows if row["frames"] > 1]
    tokens = np.array([row["tokens"] for row in rows])
    summary = {
        "clips": len(rows),
        "images": len(rows) - len(videos),
        "seconds": round(sum(row["frames"] / row["fps"] for row in videos), 1),
        "megabytes": round(sum(3 * row["frames"] * row["height"] * row["width"] for row in rows) / 1e6, 1),
        "sources": _counts(row["source"] for row in rows),
        "sizes": _counts(f"{row['width']}x{row['height']}" for row in rows),
        "aspects": _counts(aspect(row["height"], row["width"]) for row in rows),
        "durations": _counts(duration(row["frames"], row["fps"]) for row in rows),
        "frames": _counts(row["frames"] for row in rows),
        "fps": _counts(round(row["fps"]) for row in videos),
        "tokens": {"min": int(tokens.min()), "max": int(tokens.max()), "mean": round(float(tokens.mean()), 1)},
        "splits": _counts(row["split"] for row in rows),
        "captions": _counts(kind for row in rows for kind in row["kinds"]),
        "without_caption": sum(not caption_of(row) for row in rows),
        "classes": _classes(rows),
        "fill": plan_fill(tokens, pack_length, slots),
        "flagged": _counts(reason_kind(flag) for row in rows for flag in row["flags"]),
        "refused": _counts(reason_kind(entry["reason"]) for entry in dataset.refused),
    }
    pictures = (_draw_sheet(dataset, as_path(out)), _draw_histograms(dataset, as_path(out))) if out else ()
    return Inspection(summary, _text(summary), pictures)


def _classes(rows: list[dict]) -> dict[str, int]:
    """Count the clips of each class, in order of the class numbers: "3", or with its name "3 fox"."""
    labelled = [row for row in rows if row["label"] >= 0]
    names = {row["label"]: dict(zip(row["kinds"], row["captions"])).get("label", "") for row in labelled}
    counts = Counter(row["label"] for row in labelled)
    return {f"{n} {names[n]}" if names[n] not in ("", str(n)) else str(n): counts[n] for n in sorted(counts)}


def aspect(height: int, width: int) -> str:
    """Return the named ratio, width to height, that is nearest to that of a picture."""
    ratio = min(height, width) / max(height, width)
    name = min(ASPECTS, key=lambda name: abs(np.log(ratio / ASPECTS[name])))
    return name if width <= height else ":".join(reversed(name.split(":")))


def duration(frames: int, fps: float) -> str:
    """Return the span of seconds that a clip falls into, or "image"."""
    if frames == 1:
        return "image"
    return next((f"< {bound} s" for bound in DURATIONS if frames / fps < bound), f">= {DURATIONS[-1]} s")


def plan_fill(tokens: np.ndarray, pack_length: int | None, slots: int = PackingConfig.slots) -> dict:
    """Return the share of packs of that length that is filled when all clips are planned once."""
    longest = int(tokens.max())
    length = 2 * longest if pack_length is None else pack_length
    check(length >= longest, f"--pack-length is {length}; it must be at least {longest} tokens, those of a clip")
    check(slots >= 1, f"--slots is {slots}; it must be at least 1")
    packing, texts = PackingConfig(length, slots), np.zeros_like(tokens)
    planned = plan(0, 0, tokens, texts, packing)
    found = {"pack_length": length, "slots": slots, "packs": len(planned)}
    fill = round(tokens.sum() / (len(planned) * length), 4)
    return found | {"fill": fill, "advice": advise(tokens, texts, packing)}


def _draw_sheet(dataset: Dataset, out: Path) -> Path:
    drawn = [dataset[index] for index in evenly_spread(range(len(dataset)), CLIPS)]
    scale = max(1, 96 // max(clip.frames.shape[1] for clip in drawn))
    picture = contact_sheet([c.frames for c in drawn], [c.caption for c in drawn], columns=2, scale=scale)
    return save_png(out / "contact_sheet.png", picture)


def _draw_histograms(dataset: Dataset, out: Path) -> Path:
    """Draw the durations, aspect ratios, areas and tokens of all clips."""
    from matplotlib.figure import Figure

    columns = ("frames", "height", "width", "fps", "tokens")
    frames, height, width, fps, tokens = (dataset.table[name].to_numpy() for name in columns)
    panels = {"seconds of the videos": (frames / fps)[frames > 1], "width / height": width / height}
    panels |= {"megapixels of a frame": height * width / 1e6, "tokens of a clip": tokens}
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        axes.hist(values, bins=30, color="#4477aa")
        axes.set(xlabel=title, ylabel="clips")
        axes.locator_params(axis="x", nbins=5)  # long numbers would run into each other
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(out / "histogram.png") as temporary:
        figure.savefig(temporary, dpi=100)
    return out / "histogram.png"


def _counts(values: Iterable) -> dict[str, int]:
    return {str(value): n for value, n in Counter(values).most_common()}


def _text(summary: dict) -> str:
    lines = []
    for name, value in summary.items():
        if name == "fill":
            sizes = f"{value['pack_length']} tokens and {value['slots']} clips at most"
            advice = f": {value['advice']}" if value["advice"] else ""
            value = f"{value['fill']:.1%} of {value['packs']} packs of {sizes}{advice}"
        elif name == "tokens":
            value = f"{value['min']} to {value['max']}, mean {value['mean']:.0f}"
        elif isinstance(value, dict):
            parts, most = [f"{key} ({n})" for key, n in value.items()], 100 if name == "classes" else 8
            more = [f"and {len(parts) - most} more"] if len(parts) > most else []
            value = ", ".join(parts[:most] + more) or "none"
        lines.append(f"{name.replace('_', ' '):<16} {value}")
    return "\n".join(lines)
