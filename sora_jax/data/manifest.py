"""The dataset folder: clips with their captions, and the list of what was refused.

======================================  ==================================================================
`manifest.parquet`                      one row a clip, the columns of `COLUMNS`
`refused.jsonl`                         {"file", "reason"} for every file that was not used
`dataset.json`                          format version, options of the build, counts
`clips-00000-of-000NN.array_record`     raw uint8 frames (T, H, W, 3), the row tells the shape
======================================  ==================================================================
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np

from sora_jax.data.shards import ShardReader, ShardWriter
from sora_jax.data.sources import Clip
from sora_jax.errors import UserError
from sora_jax.files import new_folder

FORMAT = 1
PREFIX = "clips"
COLUMNS = {
    "index": "int64",
    "id": "string",
    "source": "string",
    "file": "string",
    "frames": "int32",
    "height": "int32",
    "width": "int32",
    "fps": "float64",
    "caption": "string",
    "split": "string",
    "note": "string",
    "shard": "int32",
    "record": "int32",
}


@contextmanager
def write_dataset(out: str | Path, options: dict, shard_bytes: int = 2**28) -> Iterator["DatasetWriter"]:
    """A writer for the folder `out`, which appears when the block ends well, and only then.

    options: kept in `dataset.json`. Raises UserError where `out` is in use or the disk is full.
    """
    with new_folder(out) as folder:
        writer = DatasetWriter(folder, shard_bytes)
        yield writer
        writer.finish(options)


class DatasetWriter:
    """Takes the clips and refusals of a dataset one by one; made by `write_dataset`."""

    def __init__(self, folder: Path, shard_bytes: int):
        self._folder, self._shards = folder, ShardWriter(folder, PREFIX, shard_bytes)
        self.rows: list[dict] = []
        self.refused: list[dict] = []

    def add(self, clip: Clip, file: str, split: str) -> None:
        """Append a clip; `file` is where it came from."""
        shard, record = self._shards.write(np.ascontiguousarray(clip.frames).tobytes())
        frames, height, width, _ = clip.frames.shape
        size = dict(frames=frames, height=height, width=width, fps=clip.fps)
        words = dict(caption=clip.caption, split=split, note=clip.note)
        row = dict(index=len(self.rows), id=clip.id, source=clip.source, file=file)
        self.rows.append(row | size | words | dict(shard=shard, record=record))

    def refuse(self, file: str, reason: str) -> None:
        """List a file that is not used."""
        self.refused.append({"file": file, "reason": reason})

    def finish(self, options: dict) -> None:
        """Close the shards and write the tables."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        shards = self._shards.close()
        schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in COLUMNS.items()])
        pq.write_table(pa.Table.from_pylist(self.rows, schema), self._folder / "manifest.parquet")
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.refused)
        (self._folder / "refused.jsonl").write_text(lines, encoding="utf-8")
        counts = {"clips": len(self.rows), "refused": len(self.refused), "shards": shards}
        info = {"format": FORMAT} | counts | {"options": options}
        (self._folder / "dataset.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


class Dataset:
    """A dataset folder: `len`, `[i]` -> Clip, `.table` (pyarrow, no frames read), `.info`, `.refused`.

    Raises UserError where the folder is missing or is not one. May be pickled and forked.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.info = read_info(self.path)
        self._table = None
        self._shards = ShardReader(self.path, PREFIX, self.info["shards"])

    def __len__(self) -> int:
        return self.info["clips"]

    @property
    def table(self):
        if self._table is None:
            import pyarrow.parquet as pq

            self._table = pq.read_table(self.path / "manifest.parquet")
        return self._table

    @cached_property
    def digest(self) -> str:
        """Hex digest of what the clips are and how they were made; equal builds of equal files have an equal one."""
        rows = [{name: value for name, value in row.items() if name not in ("source", "file")} for row in self.rows()]
        options = {name: value for name, value in self.info["options"].items() if name != "path"}
        return hashlib.sha256(json.dumps([options, rows], sort_keys=True).encode()).hexdigest()

    @property
    def refused(self) -> list[dict]:
        lines = (self.path / "refused.jsonl").read_text(encoding="utf-8").splitlines()
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
        frames = pixels.reshape(row["frames"], row["height"], row["width"], 3)
        return Clip(row["id"], frames, row["fps"], row["caption"], row["source"], row["note"])


def read_info(path: Path) -> dict:
    """The contents of `dataset.json`; UserError where there is none of this format."""
    try:
        info = json.loads((path / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} is not a dataset folder: one made by `sora-jax data build` is.") from error
    if info.get("format") != FORMAT:
        raise UserError(f"dataset={path} has format {info.get('format')}: format {FORMAT} can be read.")
    return info
