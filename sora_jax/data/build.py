"""`data build` and `data inspect`: from a source of clips to a dataset folder, and a look into one."""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from sora_jax.data.fit import LENGTH_RULES, SizeRule, fit_length, longest_length, pad_frames
from sora_jax.data.manifest import Dataset, read_info, write_dataset
from sora_jax.data.media import save_png
from sora_jax.data.sheets import contact_sheet
from sora_jax.data.sources import Clip, FolderSource, Source, WorldSource
from sora_jax.data.tracks import MediaError
from sora_jax.data.world import WorldConfig
from sora_jax.errors import UserError

PLACES = {"start": 0.0, "middle": 0.5, "random": None}


@dataclass(frozen=True)
class BuildConfig:
    """Options of a build; all but `out` and `workers` decide what is in the dataset.

    source: "folder" (of videos and pictures, at `path`) or "world" (`limit` clips of `world`). max_frames,
    time_factor, length_rule: lengths, see `data/fit.py`; a clip that ends shorter than min_frames is
    refused. place: which part of a longer clip is taken; "random" is a function of seed and the clip's id.
    multiple, max_pixels: sizes, see `data/fit.py`. max_fps: faster clips are slowed down to it by leaving
    out frames; slower ones keep their rate. missing_caption: "refuse" the clip, or let the caption be
    "empty". strip_frames, strip_fps: read each picture as a strip of frames. holdout: share of the clips
    without a given split that get the split "held-out", by a hash of seed and id. limit: at most so many
    clips, evenly spread over the sorted source. workers: processes that decode; 1 decodes in this one.
    """

    out: str
    source: str = "folder"
    path: str = ""
    world: WorldConfig | None = None
    max_frames: int = 17
    time_factor: int = 4
    length_rule: str = "cut"
    min_frames: int = 1
    place: str = "middle"
    multiple: int = 16
    max_pixels: int | None = 256 * 256
    max_fps: float | None = None
    missing_caption: str = "refuse"
    strip_frames: int | None = None
    strip_fps: float = 8.0
    holdout: float = 0.05
    seed: int = 0
    limit: int | None = None
    workers: int = 1

    def __post_init__(self):
        SizeRule(self.multiple, self.max_pixels)
        for name, allowed in _WORDS.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} is not allowed: {' or '.join(allowed)} is.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value} is not allowed: at least {least} is.")
        if not 0 <= self.holdout < 1:
            raise UserError(f"holdout={self.holdout} is not allowed: a share from 0 to below 1 is.")
        if self.max_fps is not None and self.max_fps <= 0 or self.strip_fps <= 0:
            raise UserError(f"max_fps={self.max_fps}, strip_fps={self.strip_fps}: rates above 0 are allowed.")
        if self.source == "world" and self.limit is None:
            raise UserError("limit is not given: source=world needs the number of clips.")
        if self.source == "folder" and not self.path:
            raise UserError("path is not given: source=folder needs a folder of videos or pictures.")


_WORDS = {
    "source": ("folder", "world"),
    "length_rule": LENGTH_RULES,
    "place": tuple(PLACES),
    "missing_caption": ("refuse", "empty"),
}
_LEAST = dict(max_frames=1, time_factor=1, min_frames=1, strip_frames=1, limit=1, workers=1, seed=0)


class Refusal(NamedTuple):
    """Why a clip is not used."""

    reason: str


def build(config: BuildConfig, progress: bool = True) -> Dataset:
    """Read every clip of the source, give it an allowed size and length, write the folder `config.out`.

    Clips that cannot be used are counted and listed in `refused.jsonl` and never stop the build; the order
    in the dataset is that of the source, whatever the number of workers. A folder built before with the same
    options from the same files is returned as it is.

    Raises UserError for an empty or missing source, one of which nothing can be used, an `out` in use.
    """
    source = make_source(config)
    options = _options(config, source)
    if Path(config.out, "dataset.json").exists():
        return _built_before(config, options)
    if not len(source) and not source.refused:
        raise UserError(f"path={config.path} is empty: a folder with videos or pictures is allowed.")
    chosen = _spread(len(source), config.limit)
    with write_dataset(config.out, options) as writer:
        for file, reason in source.refused:
            writer.refuse(file, reason)
        results = tqdm(prepare_all(source, config, chosen), "clips", len(chosen), disable=not progress)
        for index, result in zip(chosen, results, strict=True):
            entry = source.entry(index)
            if isinstance(result, Refusal):
                writer.refuse(entry.id, result.reason)
            else:
                writer.add(result, entry.id, entry.split or hashed_split(config, entry.id))
        if not writer.rows:
            first = writer.refused[-1]
            raise UserError(
                f"path={config.path} holds nothing usable: {_tally(writer.refused)}; {first['file']}: {first['reason']}"
            )
    return Dataset(config.out)


def make_source(config: BuildConfig) -> Source:
    """The source that the options name."""
    if config.source == "folder":
        return FolderSource(config.path, config.strip_frames, config.strip_fps)
    world, held_out = config.world or WorldConfig(), round(config.limit * config.holdout)
    wrong = [size for size in world.sizes if any(side % config.multiple for side in size)]
    if wrong:
        raise UserError(f"multiple={config.multiple} does not divide the world's size {wrong[0]}: 4 or 8 does.")
    return WorldSource(world, config.limit - held_out, held_out)


def _options(config: BuildConfig, source: Source) -> dict:
    options = asdict(replace(config, out="", workers=1))
    if isinstance(source, FolderSource):
        options |= {"digest": source.digest()}
    return json.loads(json.dumps(options))


def _built_before(config: BuildConfig, options: dict) -> Dataset:
    before = read_info(Path(config.out))["options"]
    changed = sorted(name for name in options | before if options.get(name) != before.get(name))
    if "digest" in changed:
        raise UserError(f"out={config.out} was built from other files: give another folder or remove it.")
    if changed:
        name = changed[0]
        raise UserError(
            f"out={config.out} was built with {name}={before.get(name)!r}, not {options.get(name)!r}:"
            " give another folder or remove this one."
        )
    return Dataset(config.out)


def _spread(count: int, limit: int | None) -> list[int]:
    wanted = min(count, limit or count)
    return [i * count // wanted for i in range(wanted)]


def _tally(refused: list[dict]) -> str:
    counts = Counter(kind(entry["reason"]) for entry in refused)
    return ", ".join(f"{n} x {reason}" for reason, n in counts.most_common(3))


def kind(reason: str) -> str:
    """A reason without its particulars."""
    return reason.split(":")[0]


def hashed_split(config: BuildConfig, clip_id: str) -> str:
    """The split of a clip that was given none: a function of seed and id."""
    return "held-out" if uniform(config.seed, "split", clip_id) < config.holdout else "train"


def uniform(seed: int, purpose: str, clip_id: str) -> float:
    """A number in [0, 1), the same for the same seed, purpose and clip."""
    key = hashlib.blake2b(f"{seed}/{purpose}/{clip_id}".encode(errors="replace"), digest_size=16).digest()
    return float(np.random.Generator(np.random.Philox(key=int.from_bytes(key))).random())


def prepare(source: Source, config: BuildConfig, index: int) -> Clip | Refusal:
    """Clip `index` at its final size and length, or why there is none."""
    entry = source.entry(index)
    if entry.caption is None and config.missing_caption == "refuse":
        return Refusal(
            "no caption: neither a text file of the same name nor a row in captions.csv; missing_caption=empty takes it"
        )
    place = PLACES[config.place]
    place = uniform(config.seed, "place", entry.id) if place is None else place
    try:
        clip = source.read(
            index,
            max_frames=longest_length(config.time_factor, config.max_frames),
            max_fps=config.max_fps,
            place=place,
            fit=None if config.source == "world" else SizeRule(config.multiple, config.max_pixels),
        )
    except MediaError as error:
        return Refusal(str(error))
    return _to_length(clip, config, place)


def _to_length(clip: Clip, config: BuildConfig, place: float) -> Clip | Refusal:
    have = len(clip.frames)
    length = fit_length(have, config.time_factor, config.max_frames, config.length_rule)
    if length < config.min_frames:
        damage = f" ({clip.note})" if clip.note else ""
        return Refusal(f"too short: {have} frames give {length}, min_frames is {config.min_frames}{damage}")
    first = round(place * max(0, have - length))
    return replace(clip, frames=pad_frames(clip.frames[first : first + length], length))


def prepare_all(source: Source, config: BuildConfig, chosen: list[int]) -> Iterator[Clip | Refusal]:
    """`prepare` for each index, in order, in `config.workers` processes; a crash costs only its own clip."""
    if config.workers == 1:
        yield from (prepare(source, config, index) for index in chosen)
        return
    done = 0
    while done < len(chosen):
        try:
            for result in _pooled(source, config, chosen[done:]):
                yield result
                done += 1
        except BrokenProcessPool:
            yield _alone(source, config, chosen[done])
            done += 1


def _pooled(source: Source, config: BuildConfig, chosen: list[int]) -> Iterator[Clip | Refusal]:
    task = partial(prepare, source, config)
    with _pool(config.workers) as pool:
        waiting = deque()
        for index in chosen:
            waiting.append(pool.submit(task, index))
            if len(waiting) == 4 * config.workers:  # so that decoded clips do not pile up
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _alone(source: Source, config: BuildConfig, index: int) -> Clip | Refusal:
    with _pool(1) as pool:
        try:
            return pool.submit(prepare, source, config, index).result()
        except BrokenProcessPool:
            return Refusal("crash: the decoder took its process down")


def _pool(workers: int) -> ProcessPoolExecutor:
    import multiprocessing

    # Not forked: the caller may hold threads of an accelerator runtime.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


class Inspection(NamedTuple):
    """What `inspect` found: counts as a dict, the same as text, and the contact sheet's file."""

    summary: dict
    text: str
    sheet: Path


def inspect(path: str | Path, sheet: str | Path | None = None, clips: int = 12) -> Inspection:
    """Count what a dataset folder holds and draw `clips` of its clips on a sheet (default: inside it)."""
    dataset = Dataset(path)
    summary = summarise(dataset)
    shown = _spread(len(dataset), clips)
    drawn = [dataset[i] for i in shown]
    scale = max(1, 96 // max(clip.frames.shape[1] for clip in drawn))
    picture = contact_sheet([c.frames for c in drawn], [c.caption for c in drawn], columns=2, scale=scale)
    return Inspection(summary, _text(summary), save_png(sheet or Path(path, "contact_sheet.png"), picture))


def summarise(dataset: Dataset) -> dict:
    """Counts by size, length, rate, split and reason of refusal; seconds; what was used in part."""
    rows = dataset.table.to_pylist()
    return {
        "clips": len(rows),
        "images": sum(row["frames"] == 1 for row in rows),
        "seconds": round(sum(row["frames"] / row["fps"] for row in rows if row["frames"] > 1), 1),
        "megabytes": round(sum(3 * row["frames"] * row["height"] * row["width"] for row in rows) / 1e6, 1),
        "sizes": _counts(f"{row['width']}x{row['height']}" for row in rows),
        "frames": _counts(row["frames"] for row in rows),
        "fps": _counts(round(row["fps"]) for row in rows if row["frames"] > 1),
        "splits": _counts(row["split"] for row in rows),
        "without_caption": sum(not row["caption"] for row in rows),
        "used_in_part": [{"id": row["id"], "note": row["note"]} for row in rows if row["note"]],
        "refused": _counts(kind(entry["reason"]) for entry in dataset.refused),
    }


def _counts(values) -> dict[str, int]:
    return {str(value): n for value, n in Counter(values).most_common()}


def _text(summary: dict) -> str:
    lines = []
    for name, value in summary.items():
        if isinstance(value, dict):
            shown = [f"{key} ({n})" for key, n in list(value.items())[:8]]
            more = [f"and {len(value) - 8} more"] if len(value) > 8 else []
            value = ", ".join(shown + more) or "none"
        elif isinstance(value, list):
            value = "; ".join(f"{entry['id']}: {entry['note']}" for entry in value) or "none"
        lines.append(f"{name.replace('_', ' '):<16} {value}")
    return "\n".join(lines)
