"""Show what a dataset folder holds, in numbers and in pictures (`data inspect`)."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sora_jax.config import check
from sora_jax.data.building.build import reason_kind
from sora_jax.data.feeding import tokenizer as tokenizers
from sora_jax.data.feeding.texts import TokenizedCaptions, captions_in_order
from sora_jax.data.feeding.tokenizer import TokenizerConfig
from sora_jax.data.packing.advice import advise
from sora_jax.data.packing.packs import PackingConfig
from sora_jax.data.packing.planning import plan
from sora_jax.data.storing.manifest import Dataset, caption_of, evenly_spread
from sora_jax.data.viewing.sheets import contact_sheet, strip
from sora_jax.data.viewing.write import save_png
from sora_jax.files import as_path, replacing

ASPECTS = {"9:21": 9 / 21, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 3 / 4, "1:1": 1.0}
DURATIONS = (1, 2, 4, 8, 16, 32, 60)
CLIPS = 24  # on the contact sheet
PICTURES = CLIPS // 4  # on it at least, if there are so many
SIDE = 96  # pixels of a square of about the area to which smaller clips are enlarged on it, by whole factors
SMOOTH = 12  # frames per second that are enough for people to see motion
SHORT = 1.0  # seconds; a dataset of shorter clips of a higher rate is advised to drop frames


class Inspection(NamedTuple):
    """Hold what `inspect` found: counts as a dict, the same as text, and the pictures that it drew."""

    summary: dict
    text: str
    pictures: tuple[Path, ...]


class Training(NamedTuple):
    """Hold what the config of a training says of its packs: their sizes, the captions in them, and the split."""

    name: str
    packing: PackingConfig
    tokenizer: TokenizerConfig | None
    split: str


def inspect(
    path: str | Path,
    pack_length: int | None = None,
    slots: int = PackingConfig.slots,
    out: str | Path | None = None,
    training: Training | None = None,
) -> Inspection:
    """Count what a dataset folder holds; the folder is only read.

    Args:
        path: dataset folder.
        pack_length: tokens of the packs whose fill is counted; None: twice those of the longest clip. Captions, which
            training packs beside clips, take no room here.
        slots: most clips in such a pack.
        out: folder for contact_sheet.png, with some of the clips, and histogram.png; None: no pictures.
        training: whose packs are counted, with its captions, in place of `pack_length` and `slots`.
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
        "lengths": _counts(length(row["frames"], row["fps"]) for row in videos),
        "tokens": {"min": int(tokens.min()), "max": int(tokens.max()), "mean": round(float(tokens.mean()), 1)},
        "splits": _counts(row["split"] for row in rows),
        "captions": _counts(kind for row in rows for kind in row["kinds"]),
        "without_caption": sum(not caption_of(row) for row in rows),
        "classes": _classes(rows),
        "fill": training_fill(dataset, training) if training else plan_fill(tokens, pack_length, slots),
        "flagged": _counts(reason_kind(flag) for row in rows for flag in row["flags"]),
        "refused": _counts(reason_kind(entry["reason"]) for entry in dataset.refused),
    }
    pictures = (_draw_sheet(dataset, rows, as_path(out)), _draw_histograms(dataset, as_path(out))) if out else ()
    return Inspection(summary, "\n".join([_text(summary), *_hints(videos)]), pictures)


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


def length(frames: int, fps: float) -> str:
    """Say how long a clip is: "17 frames at 30 fps, 0.57 s"."""
    return f"{frames} frames at {fps:.3g} fps, {frames / fps:.2g} s"


def _hints(videos: list[dict]) -> list[str]:
    """Advise to drop frames where most of the videos are so short that little happens in them."""
    fast = [row for row in videos if row["fps"] > SMOOTH and row["frames"] / row["fps"] < SHORT]
    if 2 * len(fast) <= len(videos):
        return []
    longest = max(row["frames"] for row in fast)
    return [
        f"{len(fast)} of {len(videos)} videos last less than {SHORT:g} s; with --max-fps=8, {longest} frames of a "
        f"longer file last {longest / 8:.2g} s"
    ]


def training_fill(dataset: Dataset, training: Training) -> dict:
    """Return the share of the packs of a training that is filled in its first epoch.

    Tokens are those of the manifest: clips that lose their beginning, and guides, are not counted.
    """
    clips, packing = dataset.indices(training.split), training.packing
    tokens, texts = dataset.kept("tokens")[clips], np.zeros(len(clips), np.int64)
    if training.tokenizer:
        tokenizer = tokenizers.train(captions_in_order(dataset, clips), training.tokenizer)
        texts = TokenizedCaptions(dataset, tokenizer).lengths(clips, np.zeros_like(clips))
    return {"of": training.name} | _planned(tokens, packing.margin(_grids(dataset, clips, tokens)), texts, packing)


def _grids(dataset: Dataset, clips: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the grids (t, h, w) of the tokens that the manifest counts."""
    sides = np.stack([dataset.kept(name)[clips] for name in ("height", "width")], axis=-1)
    sides = sides // dataset.header["options"]["multiple"]
    return np.concatenate([tokens[:, None] // sides.prod(-1, keepdims=True), sides], axis=-1)


def plan_fill(tokens: np.ndarray, pack_length: int | None, slots: int = PackingConfig.slots) -> dict:
    """Return the share of packs of that length that is filled when all clips are planned once."""
    longest = int(tokens.max())
    length = 2 * longest if pack_length is None else pack_length
    check(length >= longest, f"--pack-length is {length}; it must be at least {longest} tokens, those of a clip")
    check(slots >= 1, f"--slots is {slots}; it must be at least 1")
    return _planned(tokens, np.zeros_like(tokens), np.zeros_like(tokens), PackingConfig(length, slots))


def _planned(tokens: np.ndarray, margin: np.ndarray, texts: np.ndarray, packing: PackingConfig) -> dict:
    rooms = tokens + margin
    planned = plan(0, 0, rooms, texts, packing)
    found = {"pack_length": packing.length, "slots": packing.slots, "packs": len(planned)}
    fill = round(int(tokens.sum()) / (len(planned) * packing.length), 4)
    return found | {"fill": fill, "clips": len(tokens), "advice": advise(rooms, texts, packing)}


def choose_shown(rows: list[dict], most: int = CLIPS, pictures: int = PICTURES) -> list[dict]:
    """Choose clips to look at, evenly spread over sizes and lengths: videos, then at least so many pictures."""
    videos = [row for row in rows if row["frames"] > 1]
    stills = [row for row in rows if row["frames"] == 1]
    shown = _in_turn(videos, max(most - min(pictures, len(stills)), 0))
    return shown + _in_turn(stills, most - len(shown))


def _in_turn(rows: list[dict], most: int) -> list[dict]:
    """Give sizes and lengths places in turn, first one for each of their files; evenly spread, sorted by size."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["height"], row["width"], row["frames"]), []).append(row)
    by_number = sorted(groups.values(), key=len, reverse=True)
    files = [len({row["file"] for row in group}) for group in by_number]
    more = [len(group) - count for group, count in zip(by_number, files)]
    places = Counter(islice(chain(_turns(files, most), _turns(more, most)), most))
    shown = [row for number, count in places.items() for row in _spread(by_number[number], count)]
    return sorted(shown, key=lambda row: (row["height"], row["width"], row["frames"]))


def _turns(counts: list[int], most: int) -> Iterator[int]:
    """Yield 0, 1, 2, ..., 0, 1, 2, ..., each number as often as its count says, but no more than `most` times."""
    turns = zip_longest(*([number] * min(count, most) for number, count in enumerate(counts)))
    return (number for turn in turns for number in turn if number is not None)


def _spread(rows: list[dict], count: int) -> list[dict]:
    """Choose rows, evenly spread, of one clip a file if there are as many files."""
    once = list({row["file"]: row for row in rows}.values())
    return evenly_spread(once if len(once) >= count else rows, count)


def _draw_sheet(dataset: Dataset, rows: list[dict], out: Path) -> Path:
    shown = choose_shown(rows)
    strips = [_strip(dataset[row["index"]].frames) for row in shown]
    return save_png(out / "contact_sheet.png", contact_sheet(strips, list(map(_title, shown)), None, shown=1))


def _strip(frames: np.ndarray) -> np.ndarray:
    return strip(frames, 4, max(1, round(SIDE / math.sqrt(frames[0, :, :, 0].size))))[None]


def _title(row: dict) -> str:
    size = f"{row['width']}x{row['height']}"
    kind = length(row["frames"], row["fps"]) if row["frames"] > 1 else "picture"
    return f"{size}, {kind}: {caption_of(row) or 'no caption'}"


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
            of = f", as {value['of']} makes them" if "of" in value else ""
            sizes = f"{value['pack_length']} tokens and at most {value['slots']} clips"
            advice = f"; {value['advice']}" if value["advice"] else ""
            packs = f"{value['packs']} packs of {sizes}{of}, {value['clips'] / value['packs']:.1f} clips each"
            value = f"{value['fill']:.1%} of {packs}{advice}"
        elif name == "tokens":
            value = f"{value['min']} to {value['max']}, mean {value['mean']:.0f}"
        elif isinstance(value, dict):
            parts, most = [f"{key} ({n})" for key, n in value.items()], 100 if name == "classes" else 8
            more = [f"and {len(parts) - most} more"] if len(parts) > most else []
            value = ", ".join(parts[:most] + more) or "none"
        lines.append(f"{name.replace('_', ' '):<16} {value}")
    return "\n".join(lines)
