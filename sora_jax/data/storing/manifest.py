"""The dataset folder: clips with their captions, and the list of what was refused.

======================================  ==================================================================
`manifest.parquet`                      one row a clip, the columns of `COLUMNS`, with shard and record
`refused.jsonl`                         {"file", "reason"} for every file that was not used
`dataset.json`                          format version, options of the build, counts, digest of the rows
`clips-00000-of-000NN.array_record`     raw uint8 frames (T, H, W, 3), the row tells the shape
======================================  ==================================================================

`id` names the content, `variant` tells apart the sizes or parts of one clip that epochs take in turn, `start` is in
seconds of the file, `tokens` counts one for `time_factor` frames and `multiple` x `multiple` pixels (the options of the
build). `kinds` names each of the `captions`; `label` is -1 where there is none; `weight` says how often the clip comes
in an epoch, on average; `flags` are notes such as "partial: ...".
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np

from sora_jax.data.storing.clips import Clip, clip_id_of
from sora_jax.data.storing.parts import Kind, PartWriter, start
from sora_jax.data.storing.shards import PIXELS, ShardReader
from sora_jax.data.storing.splits import indices_of_split
from sora_jax.errors import UserError
from sora_jax.files import as_path, local_copy, read_text

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
KEY = ("id", "variant")


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


@contextmanager
def write_dataset(out: str | Path, options: dict) -> Iterator[PartWriter]:
    """A writer (`add_clip`, `refuse`) for a dataset of one part; the folder appears when the block ends well."""
    parts = start(out, KIND, {"options": options}, 1)
    with parts.write(0) as writer:
        yield writer
    parts.finish({"format": FORMAT, "options": options}, KEY)


class Dataset:
    """A dataset folder: `len`, `[i]` -> Clip, `.table` (pyarrow, no frames read), `.info`, `.refused`.

    Raises UserError where the folder is missing or is not one. May be pickled and forked.
    """

    def __init__(self, path: str | Path):
        self.path = as_path(path)
        self.info = read_info(self.path)
        self._table = None
        self._shards = ShardReader(self.path, PREFIX, self.info["parts"])

    def __len__(self) -> int:
        return self.info["clips"]

    def __getstate__(self):
        return self.path

    def __setstate__(self, path):
        self.__init__(path)

    @property
    def table(self):
        if self._table is None:
            import pyarrow.parquet as pq

            self._table = pq.read_table(local_copy(self.path / "manifest.parquet"))
        return self._table

    @property
    def digest(self) -> str:
        """Hex digest of what the clips are and how they were made; equal builds of equal files have an equal one."""
        options = {k: v for k, v in self.info["options"].items() if k not in ("sources", "digests")}
        return hashlib.sha256(json.dumps([options, self.info["digest"]], sort_keys=True).encode()).hexdigest()

    def column(self, name: str):
        """Return a column of the manifest, an Arrow array."""
        column = self.table[name].combine_chunks()
        return column.chunk(0) if hasattr(column, "num_chunks") else column

    @cached_property
    def clip_ids(self) -> np.ndarray:
        """Id of each clip (n,) uint32, the same for all variants of a clip."""
        return np.array([clip_id_of(id) for id in self.column("id").to_pylist()], np.uint32)

    @cached_property
    def grids(self) -> np.ndarray:
        """Size of each clip (n, 3) int64: frames, height, width."""
        return np.stack([self.column(side).to_numpy() for side in ("frames", "height", "width")], 1).astype(np.int64)

    @cached_property
    def labels(self) -> np.ndarray:
        """Class of each clip (n,) int32, -1 for none."""
        return self.column("label").to_numpy()

    @cached_property
    def weights(self) -> np.ndarray:
        """Give how often each clip comes in an epoch, on average, (n,) float64."""
        return self.column("weight").to_numpy().astype(np.float64)

    @property
    def has_variants(self) -> bool:
        """True if some clip is there in several sizes or places."""
        return bool(self.column("variant").to_numpy().any())

    def indices(self, split: str) -> np.ndarray:
        """Return the indices (n,) of the clips of a split; UserError, naming the splits there are, if it has none."""
        return indices_of_split(split, self.column("split"), f"the dataset {self.path}")

    def ids(self, indices: Sequence[int]) -> list[str]:
        """Return the names of some clips."""
        return self.column("id").take(np.asarray(indices, np.int64)).to_pylist()

    def item(self, index: int) -> np.ndarray:
        """Return the uint8 pixels (T, H, W, 3) of a clip."""
        return self[index].frames

    @cached_property
    def refused(self) -> list[dict]:
        lines = read_text(self.path / "refused.jsonl").splitlines()
        return [json.loads(line) for line in lines]

    def rows(self, split: str | None = None) -> list[dict]:
        """The manifest's rows of a split (of all clips when None), in order; each knows its `index`."""
        return [row for row in self.table.to_pylist() if split in (None, row["split"])]

    def held_out(self, trained: str = "train") -> list[dict]:
        """The manifest's rows of every split but the one trained on, whatever they are called, in order.

        A build names its own held-out clips "held-out"; a `captions.csv` may say "test" or "val".
        """
        return [row for row in self.rows() if row["split"] != trained]

    def row(self, index: int) -> dict:
        """The manifest's row of a clip, as a dict of the columns."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.table.slice(index, 1).to_pylist()[0]

    def __getitem__(self, index: int) -> Clip:
        row = self.row(index)
        pixels = np.frombuffer(self._shards.read(row["shard"], row["record"]), np.uint8)
        return Clip(
            id=row["id"],
            frames=pixels.reshape(row["frames"], row["height"], row["width"], 3),
            fps=row["fps"],
            captions=captions_of(row),
            source=row["source"],
            label=None if row["label"] < 0 else row["label"],
            start=row["start"],
            flags=tuple(row["flags"]),
        )


def captions_of(row: dict) -> dict[str, str]:
    """kind -> text of a manifest's row."""
    return dict(zip(row["kinds"], row["captions"], strict=True))


def caption_of(row: dict) -> str:
    """The first caption of a manifest's row, or the empty one."""
    return row["captions"][0] if row["captions"] else ""


def read_info(path: Path) -> dict:
    """The contents of `dataset.json`; UserError where there is none of this format."""
    try:
        info = json.loads(read_text(path / "dataset.json"))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} is not a dataset folder: one made by `sora-jax data build` is.") from error
    if info.get("format") != FORMAT:
        raise UserError(
            f"{str(path)!r} has format {info.get('format')}, which this version does not read: build it again."
        )
    return info


def evenly_spread(items: Sequence, most: int) -> list:
    """Choose at most so many of the items, evenly spread, the first and the last among them."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, most).astype(int))] if len(items) else []
