"""The latent cache: every clip encoded once, with the fingerprint of what encoded it.

A folder L holds `latents-*.array_record` (one record a clip: raw float16 (t, h, w, C), normalised),
`manifest.parquet` (one row a clip) and `cache.json` (format version, fingerprint, digest of
the dataset, channels, factors, shards).
It is written under a hidden name beside L, shard by shard, and renamed when complete; a writer that was stopped goes
on after its last complete shard.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from sora_jax.data.shards import ShardReader, shard_name
from sora_jax.errors import UserError
from sora_jax.files import unfinished, write_json

FORMAT = 2
PREFIX = "latents"
_OPTIONS = "group_size:1,uncompressed"  # one record a group: random reads; float16 noise does not compress


def clip_uid(id: str) -> int:
    """Stable 32-bit name of a clip, never 0 (0 marks an empty slot); what its noise is keyed by."""
    return zlib.crc32(id.encode("utf-8", "surrogatepass")) or 1


@dataclass(frozen=True)
class LatentEntry:
    """What the manifest says of one clip; sizes in pixels."""

    id: str
    frames: int
    height: int
    width: int
    fps: float
    caption: str
    split: str = "train"


class LatentWriter:
    """Writes a cache; use as a context manager, which completes the folder if no error came.

    `fingerprint` is of the autoencoder, `data` the digest of the dataset; shards of another pair are not gone on with.

    `done` holds the ids that an earlier, stopped writer left in complete shards: skip those. A cache that is
    already at `path` is replaced at the end. UserError if `path` is something else, or the disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fingerprint: str,
        data: str,
        channels: int,
        factors: tuple[int, int, int],
        shard_clips: int = 1024,
    ):
        self.path = Path(path)
        if self.path.exists() and not (self.path / "cache.json").exists():
            raise UserError(f"{self.path} exists and is not a latent cache; choose another folder")
        self.partial = unfinished(self.path)
        self.header = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "data": data,
            "latent_channels": channels,
            "factors": list(factors),
        }
        self.shard_clips = shard_clips
        self._resume()
        self.done = {row["id"] for row in self._rows}
        self._pending: list[tuple[dict, bytes]] = []

    def add(self, entry: LatentEntry, latent: np.ndarray) -> None:
        """Append one clip; latent (t, h, w, C), kept as float16. UserError if not finite or of another C."""
        if latent.ndim != 4 or latent.shape[-1] != self.header["latent_channels"]:
            channels = self.header["latent_channels"]
            raise UserError(f"clip {entry.id!r}: latent shape {latent.shape} is not (t, h, w, {channels})")
        stored = latent.astype(np.float16)
        if not np.isfinite(stored).all():
            raise UserError(f"clip {entry.id!r}: its latent has values that float16 cannot hold")
        if entry.id in self.done:
            raise UserError(f"clip {entry.id!r} is already in the cache; ids must differ")
        self.done.add(entry.id)
        t, h, w, _ = latent.shape
        row = {**asdict(entry), "uid": clip_uid(entry.id), "t": t, "h": h, "w": w}
        self._pending.append((row, stored.tobytes()))
        if len(self._pending) >= self.shard_clips:
            self._write_shard()

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self._complete()

    def _resume(self) -> None:
        self._rows, self._shards = [], 0
        with _disk_errors(self.partial):
            if self.partial.exists() and _read_json(self.partial / "cache.json") != self.header:
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True, exist_ok=True)
            write_json(self.partial / "cache.json", self.header)
        while (rows := _read_json(self.partial / f"{_partial(self._shards)}.json")) is not None:
            self._rows += rows
            self._shards += 1

    def _write_shard(self) -> None:
        name = _partial(self._shards)
        places = [{"shard": self._shards, "record": record} for record in range(len(self._pending))]
        rows = [row | place for (row, _), place in zip(self._pending, places, strict=True)]
        with _disk_errors(self.partial):
            _write_records(self.partial / name, [data for _, data in self._pending])
            write_json(self.partial / f"{name}.json", rows)  # its presence says that the shard is complete
        self._rows += rows
        self._shards += 1
        self._pending = []

    def _complete(self) -> None:
        if self._pending:
            self._write_shard()
        if not self._rows:
            raise UserError(f"no clip was encoded for the latent cache {self.path}")
        with _disk_errors(self.partial):
            _write_manifest(self.partial / "manifest.parquet", self._rows)
            write_json(self.partial / "cache.json", self.header | {"shards": self._shards})
            for number in range(self._shards):
                final = shard_name(PREFIX, number, self._shards)
                (self.partial / _partial(number)).rename(self.partial / final)
                (self.partial / f"{_partial(number)}.json").unlink()
            _replace_folder(self.partial, self.path)


def _partial(number: int) -> str:
    return f"{PREFIX}-{number:05d}.partial"


def _write_records(path: Path, records: list[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    try:
        writer = ArrayRecordWriter(str(path), _OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
        reader = ArrayRecordReader(str(path))
        kept = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError) as error:  # how the library says that a write or the footer failed
        raise OSError(errno.EIO, str(error)) from error
    if kept != len(records):
        raise OSError(errno.EIO, f"{kept} of {len(records)} records were kept")


def _write_manifest(path: Path, rows: list[dict]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([{"index": index, **row} for index, row in enumerate(rows)])
    uid = table.schema.get_field_index("uid")
    pq.write_table(table.set_column(uid, "uid", table["uid"].cast(pa.uint32())), path)


def _replace_folder(new: Path, path: Path) -> None:
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write the latent cache {path}: {error.strerror or error}") from error


class LatentCache:
    """A complete cache: `cache[i]` is latent i (t, h, w, C) float16; columns of the manifest as attributes.

    Readers open at the first read of each process, so a cache travels to worker processes, and any number of
    threads may read. UserError if `path` is no complete cache.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        header = _read_json(self.path / "cache.json")
        if header is None or not (self.path / "manifest.parquet").exists():
            raise UserError(f"{self.path} is not a latent cache; make one with `sora-jax data encode`")
        if header["format"] != FORMAT:
            raise UserError(f"{self.path} has cache format {header['format']}, this program reads {FORMAT}")
        self.fingerprint: str = header["fingerprint"]
        self.data: str = header["data"]  # digest of the dataset
        self.channels: int = header["latent_channels"]
        self.factors: tuple[int, int, int] = tuple(header["factors"])
        self._shards = ShardReader(self.path, PREFIX, header["shards"])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> np.ndarray:
        shard, record = self.manifest["shard"][index], self.manifest["record"][index]
        data = self._shards.read(shard, record)
        return np.frombuffer(data, np.float16).reshape(*self.grids[index], self.channels)

    def check(self, fingerprint: str) -> None:
        """UserError unless the cache was made by the autoencoder and preprocessing of this fingerprint."""
        if fingerprint != self.fingerprint:
            raise UserError(
                f"the latent cache {self.path} was made by another autoencoder (fingerprint "
                f"{self.fingerprint[:12]}, this run has {fingerprint[:12]}); rebuild it with "
                f"`sora-jax data encode --out={self.path}` or use the autoencoder that made it"
            )

    def indices(self, split: str) -> np.ndarray:
        """Indices (n,) of the clips of a split; UserError, naming the splits there are, if it has none."""
        found = np.flatnonzero(self.splits == split)
        if not len(found):
            have = ", ".join(sorted(set(self.splits.tolist())))
            raise UserError(f"split is {split!r} but the latent cache {self.path} has {have}")
        return found

    @cached_property
    def manifest(self) -> Mapping[str, list]:
        """All columns: index, id, uid, t, h, w, frames, height, width, fps, caption, split, shard, record."""
        import pyarrow.parquet as pq

        return pq.read_table(self.path / "manifest.parquet").to_pydict()

    @cached_property
    def grids(self) -> np.ndarray:
        """Latent sizes (n, 3) int64: t, h, w."""
        return np.stack([self.manifest[side] for side in "thw"], axis=1)

    @cached_property
    def uids(self) -> np.ndarray:
        """Clip uids (n,) uint32."""
        return np.array(self.manifest["uid"], np.uint32)

    @cached_property
    def splits(self) -> np.ndarray:
        """Split names (n,)."""
        return np.array(self.manifest["split"])

    @property
    def ids(self) -> list[str]:
        """Clip ids."""
        return self.manifest["id"]

    @property
    def captions(self) -> list[str]:
        """Captions."""
        return self.manifest["caption"]
