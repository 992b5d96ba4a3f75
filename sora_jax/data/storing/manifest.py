"""Read the dataset folder: clips with their captions, and the list of what was refused.

======================================  ==================================================================
`manifest.parquet`                      one row a clip, the columns of `COLUMNS`, with shard and record
`refused.jsonl`                         {"file", "reason"} for every file that was not used
`dataset.json`                          format version, options of the build, counts, digest of the rows
`clips-00000-of-000NN.array_record`     raw uint8 frames (T, H, W, 3); the row has the shape
======================================  ==================================================================

`id` is of the content. `variant` numbers the sizes or parts of one clip that epochs take in turn. `start` is in seconds
of the file. `tokens` counts one for `time_factor` frames of `multiple` x `multiple` pixels (options of the build).
`kinds` names each of the `captions`. `label` is -1 if there is none. `weight` is how often the clip comes in an epoch,
on average. `flags` are notes such as "partial: ...".
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.data.storing.clips import Clip, clip_id_of
from sora_jax.data.storing.parts import Kind, PartWriter, read_lines
from sora_jax.data.storing.shards import PIXELS, ShardReader
from sora_jax.data.storing.store import ClipStore
from sora_jax.files import local_copy

FORMAT = 2
PREFIX = "clips"
COLUMNS = {
    "id": "string",
    "variant": "int32",
    "source": "string",
    "file": "string",
    "start": "float64",
    "frames": "int32",
    "height": "int32",
    "width": "int32",
    "fps": "float64",
    "tokens": "int32",
    "captions": "string[]",
    "kinds": "string[]",
    "label": "int32",
    "weight": "float32",
    "split": "string",
    "flags": "string[]",
}
KIND = Kind({PREFIX: PIXELS}, COLUMNS, "dataset.json")


def add_clip(
    writer: PartWriter, clip: Clip, file: str, split: str, tokens: int = 0, variant: int = 0, weight: float = 1.0
) -> None:
    """Append a clip to a part; `file` is where people find it."""
    frames, height, width, _ = clip.frames.shape
    row = dict(id=clip.id, variant=variant, source=clip.source, file=file, start=clip.start, split=split)
    row |= dict(frames=frames, height=height, width=width, fps=clip.fps, tokens=tokens, weight=weight)
    row |= dict(captions=list(clip.captions.values()), kinds=list(clip.captions), flags=list(clip.flags))
    row |= dict(label=-1 if clip.label is None else clip.label)
    writer.add(row, np.ascontiguousarray(clip.frames).tobytes())


class Dataset(ClipStore):
    """A dataset folder: `len`, `[i]` -> Clip, `.table` (pyarrow, no frames read), `.info`, `.refused`.

    Raises UserError if the path is not a dataset folder. May be pickled and forked.
    """

    info_file, format, sides = KIND.info, FORMAT, ("frames", "height", "width")
    missing = "'{path}' is not a dataset folder; it must be made by `sora-jax data build`"

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.info = self.header
        self._shards = ShardReader(self.path, PREFIX, self.info["parts"])

    @cached_property
    def table(self) -> Any:
        """Return the manifest, a pyarrow table."""
        import pyarrow.parquet as pq

        return pq.read_table(local_copy(self.path / "manifest.parquet"))

    @property
    def digest(self) -> str:
        """Return a digest of what the clips are and how they were made; equal builds of equal files have one."""
        options = {k: v for k, v in self.info["options"].items() if k not in ("sources", "digests")}
        return hashlib.sha256(json.dumps([options, self.info["digest"]], sort_keys=True).encode()).hexdigest()

    @cached_property
    def clip_ids(self) -> np.ndarray:
        """Return the id of each clip (n,) uint32, the same for all variants of a clip."""
        return np.array([clip_id_of(id) for id in self.column("id").to_pylist()], np.uint32)

    def item(self, index: int) -> np.ndarray:
        """Return the uint8 pixels (T, H, W, 3) of a clip."""
        return self[index].frames

    @cached_property
    def refused(self) -> list[dict]:
        """Return {"file", "reason"} of every file that was not used."""
        return read_lines(self.path / "refused.jsonl")

    def rows(self, split: str | None = None) -> list[dict]:
        """Return the rows of a split (None: of all clips), in order, each with its `index`."""
        return [row for row in self.table.to_pylist() if split in (None, row["split"])]

    def held_out(self, trained: str = "train") -> list[dict]:
        """Return the rows of every split but the one trained on, in order.

        A build names its own held-out clips "held-out"; a `captions.csv` may say "test" or "val".
        """
        return [row for row in self.rows() if row["split"] != trained]

    def row(self, index: int) -> dict:
        """Return the row of a clip."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.table.slice(index, 1).to_pylist()[0]

    def __getitem__(self, index: int) -> Clip:
        row = self.row(index)
        pixels = np.frombuffer(self._shards.read(row["shard"], row["record"]), np.uint8)
        frames = pixels.reshape(row["frames"], row["height"], row["width"], 3)
        captions = dict(zip(row["kinds"], row["captions"], strict=True))
        label = None if row["label"] < 0 else row["label"]
        flags = tuple(row["flags"])
        return Clip(row["id"], frames, row["fps"], captions, row["source"], label, row["start"], flags)


def caption_of(row: dict) -> str:
    """Return the first caption of a row, or the empty one."""
    return row["captions"][0] if row["captions"] else ""


def evenly_spread(items: Sequence, most: int) -> list:
    """Choose at most so many of the items, evenly spread, the first and the last among them."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, most).astype(int))] if len(items) else []
