"""The latent cache: every clip encoded once, with the fingerprint of what encoded it.

======================================  ==================================================================
`manifest.parquet`                      one row a clip, the columns of `COLUMNS`, with shard and record
`cache.json`                            format version, fingerprint of the autoencoder, digest of the dataset,
                                        channels, factors, the text encoder if there is one, the tiles where clips
                                        were cut
`latents-*.array_record`                raw float16 (t, h, w, C), normalised; of discrete latents raw uint32 (t, h, w),
                                        indices of codes
`text-*.array_record`                   raw float16 (m, E): the embeddings of all captions of the clip, one after
                                        the other; `text_tokens` has their lengths
`guides-*.array_record`                 the latents of guides (see `data.guides`), one after the other, as those of
                                        clips are kept; `guide_frames` has their frames
======================================  ==================================================================
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sora_jax.data.guides import KEY_FRAME, SKETCH, GuideCounts, Guides, counts_of
from sora_jax.data.storing.clips import clip_id_of
from sora_jax.data.storing.parts import Kind, PartWriter, ShardedWriter, start
from sora_jax.data.storing.shards import FLOATS, ShardReader
from sora_jax.errors import NotFinite, UserError
from sora_jax.files import as_path, local_copy, read_text

FORMAT = 3
LATENTS, TEXT, GUIDES = "latents", "text", "guides"
COPIED = ("id", "variant", "frames", "height", "width", "fps", "captions", "kinds", "label", "weight", "split")
COLUMNS = {
    "id": "string",
    "uid": "uint32",
    "variant": "int32",
    "t": "int32",
    "h": "int32",
    "w": "int32",
    "frames": "int32",
    "height": "int32",
    "width": "int32",
    "fps": "float64",
    "captions": "string[]",
    "kinds": "string[]",
    "text_tokens": "int32[]",
    "label": "int32",
    "weight": "float32",
    "split": "string",
}
KEY = ("id", "variant")


@dataclass(frozen=True)
class TextInfo:
    """The pretrained text encoder of a cache: name or folder, fingerprint of its weights, width E, most tokens."""

    name: str
    fingerprint: str
    width: int
    max_tokens: int


@dataclass(frozen=True)
class CacheInfo:
    """What a cache was made with, beside its clips. data: digest of the dataset; factors: (time, height, width).

    tiles: size and overlap as JSON; None where no clip was cut. codes: of discrete latents the values that each channel
    can have; the index of a code is a number with a digit for each channel, the first with weight 1. guides: how many
    it holds of each clip.
    """

    fingerprint: str
    data: str
    latent_channels: int
    factors: tuple[int, int, int]
    text: TextInfo | None = None
    tiles: dict | None = None
    codes: list[list[float]] | None = None
    guides: GuideCounts = GuideCounts()

    def plain(self) -> dict:
        text = None if self.text is None else dict(vars(self.text))
        values = {**vars(self), "factors": list(self.factors), "text": text, "format": FORMAT}
        values["guides"] = dict(vars(self.guides)) if self.guides else None
        return {name: value for name, value in values.items() if name not in ("tiles", "codes", "guides") or value}

    def to_indices(self, latent_thwC: np.ndarray) -> np.ndarray:
        """Return the indices (t, h, w) of the codes nearest to a discrete latent."""
        digits = [np.abs(z[..., None] - v).argmin(-1) for z, v in zip(np.moveaxis(latent_thwC, -1, 0), self._values)]
        return sum(digit * weight for digit, weight in zip(digits, self._weights, strict=True)).astype(np.uint32)

    def from_indices(self, indices_thw: np.ndarray) -> np.ndarray:
        """Return the latent (t, h, w, C), float32, of indices of codes."""
        pairs = zip(self._values, self._weights, strict=True)
        return np.stack([v[indices_thw // weight % len(v)] for v, weight in pairs], -1).astype(np.float32)

    @property
    def _values(self) -> list[np.ndarray]:
        return [np.asarray(values) for values in self.codes]

    @property
    def _weights(self) -> list[int]:
        return [math.prod(len(v) for v in self.codes[:channel]) for channel in range(len(self.codes))]


def start_cache(out: str | os.PathLike, info: CacheInfo, count: int, layout: dict | None = None) -> ShardedWriter:
    """The unfinished cache of `count` parts, as an earlier call with the same `info` left it.

    layout: all that decides which clips are in which part.
    """
    files = {LATENTS: FLOATS} | ({TEXT: FLOATS} if info.text else {}) | ({GUIDES: FLOATS} if info.guides else {})
    columns = COLUMNS | ({"guide_frames": "int32[]"} if info.guides else {})
    return start(out, Kind(files, columns, "cache.json"), info.plain() | {"layout": layout}, count)


class GuideLatents(NamedTuple):
    """Hold the guides of a clip: the frame of each, and its latent (1, h, w, C)."""

    frames: Sequence[int]
    latents: Sequence[np.ndarray]


def add_latent(
    writer: PartWriter,
    info: CacheInfo,
    row: Mapping,
    latent: np.ndarray,
    texts: Sequence[np.ndarray] | None = None,
    guides: GuideLatents = GuideLatents((), ()),
) -> None:
    """Append a clip to a part of a cache.

    row: the dataset's, of which `COPIED` is kept. latent (t, h, w, C), kept as float16. texts: an embedding (m, E) for
    each caption, where the cache has a text encoder. guides: where the cache has some. UserError if not finite or of
    another C.
    """
    if latent.ndim != 4 or latent.shape[-1] != info.latent_channels:
        raise UserError(f"clip {row['id']!r}: latent shape {latent.shape} is not (t, h, w, {info.latent_channels})")
    if not all(np.isfinite(z).all() for z in (latent, *guides.latents)):
        raise NotFinite(f"clip {row['id']!r}: its latent has values that are not finite")
    stored = [info.to_indices(z) if info.codes else z.astype(np.float16) for z in (latent, *guides.latents)]
    if not all(np.isfinite(values).all() for values in stored):
        raise UserError(f"clip {row['id']!r}: its latent has values that float16 cannot hold")
    t, h, w, _ = latent.shape
    kept = {name: row[name] for name in COPIED} | {"uid": clip_id_of(row["id"]), "t": t, "h": h, "w": w}
    records = [stored[0].tobytes()]
    if info.text:
        records.append(b"".join(text.astype(np.float16).tobytes() for text in texts))
    if info.guides:
        kept |= {"guide_frames": list(guides.frames)}
        records.append(b"".join(values.tobytes() for values in stored[1:]))
    writer.add(kept | {"text_tokens": [len(text) for text in texts or ()]}, *records)


def finish_cache(parts: ShardedWriter, info: CacheInfo) -> bool:
    """Complete the cache if all its parts are there."""
    return parts.finish(info.plain(), KEY, lambda refused: f"no clip was encoded for the latent cache {parts.out}")


class LatentCache:
    """A complete cache: `len`, `[i]` -> latent (t, h, w, C), and the manifest's columns. May be pickled and forked.

    UserError where the folder is missing or of another format.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = as_path(path)
        header = _read_header(self.path)
        text = header["text"] and TextInfo(**header["text"])
        names = ("fingerprint", "data", "latent_channels")
        optional = header.get("tiles"), header.get("codes"), GuideCounts(**header.get("guides", {}))
        self.info = CacheInfo(*(header[name] for name in names), tuple(header["factors"]), text, *optional)
        self._guides = ShardReader(self.path, GUIDES, header["parts"])
        self._latents = ShardReader(self.path, LATENTS, header["parts"])
        self._texts = ShardReader(self.path, TEXT, header["parts"])
        self._count = header["clips"]
        identity = json.dumps([self.info.plain(), header["digest"]], sort_keys=True)
        # Of what is in it, and in which order: an epoch of another cache of the same clips is another one.
        self.digest = hashlib.sha256(identity.encode()).hexdigest()
        self._columns = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        return self._values(self._latents.read(*self._place(index)), index)

    def _values(self, data: bytes, index: int) -> np.ndarray:
        """Return the latent frames (n, h, w, C) in a record."""
        sides = self.grids[index][1:]
        if self.info.codes:
            return self.info.from_indices(np.frombuffer(data, np.uint32).reshape(-1, *sides))
        return np.frombuffer(data, np.float16).reshape(-1, *sides, self.channels)

    def item(self, index: int) -> np.ndarray:
        """Return the latent (t, h, w, C) of a clip, as `[index]` does."""
        return self[index]

    def guides(self, index: int, count: int) -> Guides:
        """Return the first key frames of a clip, or, where `count` is negative, its first sketches."""
        frames = np.array(self.column("guide_frames")[index].as_py())
        key_frames = int(counts_of(self.info.guides, self._numbers("frames")[index])[0])
        first, kind = (0, KEY_FRAME) if count > 0 else (key_frames, SKETCH)
        chosen = slice(first, first + abs(count))
        latents = self._values(self._guides.read(*self._place(index)), index)
        return Guides(kind, frames[chosen] / self.info.factors[0], latents[chosen])

    def text(self, index: int, caption: int) -> np.ndarray:
        """The embedding (m, E) float16 of a clip's caption, by its number."""
        ends = np.cumsum(self.column("text_tokens")[index].as_py())
        whole = np.frombuffer(self._texts.read(*self._place(index)), np.float16).reshape(-1, self.info.text.width)
        return whole[ends[caption - 1] if caption else 0 : ends[caption]]

    def check(self, fingerprint: str) -> None:
        """UserError unless the cache was made by the autoencoder and preprocessing of this fingerprint."""
        if fingerprint != self.info.fingerprint:
            raise UserError(
                f"the latent cache {self.path} was made by another autoencoder (fingerprint "
                f"{self.info.fingerprint[:12]}, this run has {fingerprint[:12]}); remove it and make it again with "
                f"`sora-jax data encode --autoencoder=RUN --data=DATASET --out={self.path}`, or use the autoencoder "
                "that made it"
            )

    def check_text(self, name: str, width: int, max_tokens: int) -> None:
        """UserError unless the cache has text of this encoder (none for the empty name), width and length."""
        if not name and self.info.text is None:
            return
        text = self.info.text
        have = "no text of a pretrained encoder"
        if text is not None:
            if (text.name, text.width, text.max_tokens) == (name, width, max_tokens):
                return
            have = f"text of {text.name!r}, width {text.width}, at most {text.max_tokens} tokens"
        wanted = f"--text-encoder={name} --text-tokens={max_tokens}" if name else "no --text-encoder"
        raise UserError(
            f"config.model.text.pretrained is {name!r}, pretrained_width {width}, config.tokenizer.max_tokens "
            f"{max_tokens}; the latent cache {self.path} has {have}: make it again with {wanted}, or change the config"
        )

    def indices(self, split: str) -> np.ndarray:
        """Indices (n,) of the clips of a split; UserError, naming the splits there are, if it has none."""
        found = np.flatnonzero(self.splits == split)
        if not len(found):
            have = ", ".join(sorted(set(self.splits.tolist())))
            raise UserError(f"split is {split!r} but the latent cache {self.path} has {have}")
        return found

    def column(self, name: str):
        """A column of the manifest, an Arrow array; read from the disk when it is first asked for."""
        if name not in self._columns:
            import pyarrow as pa
            import pyarrow.parquet as pq

            table = pq.read_table(local_copy(self.path / "manifest.parquet"), columns=[name])
            column = table[name].combine_chunks()
            self._columns[name] = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        return self._columns[name]

    def ids(self, indices: Sequence[int]) -> list[str]:
        """Ids of some clips."""
        return self.column("id").take(np.asarray(indices, np.int64)).to_pylist()

    def _numbers(self, name: str) -> np.ndarray:
        return self.column(name).to_numpy()

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        return self._numbers("shard"), self._numbers("record")

    def _place(self, index: int) -> tuple[int, int]:
        shards, records = self._places
        return int(shards[index]), int(records[index])

    @cached_property
    def grids(self) -> np.ndarray:
        """Latent sizes (n, 3) int64: t, h, w."""
        return np.stack([self._numbers(side) for side in "thw"], axis=1).astype(np.int64)

    @cached_property
    def clip_ids(self) -> np.ndarray:
        """Clip uids (n,) uint32, the same for all variants of a clip."""
        return self._numbers("uid")

    @cached_property
    def labels(self) -> np.ndarray:
        """Class of each clip (n,) int32, -1 = none."""
        return self._numbers("label")

    def check_labels(self, classes: int, split: str) -> None:
        """UserError unless every clip of the split has one of so many classes."""
        labels = self.labels[self.indices(split)]
        if labels.min() < 0 or labels.max() >= classes:
            have = f"classes up to {labels.max()}" if labels.max() >= 0 else "no class"
            have = "clips without a class" if labels.min() < 0 <= labels.max() else have
            raise UserError(
                f"config.model.classes is {classes}; the latent cache {self.path} has {have}: every clip needs one "
                f"of 0 to {classes - 1}, from a column `label` or a TFDS class label"
            )

    @cached_property
    def weights(self) -> np.ndarray:
        """Give how often each clip comes in an epoch, on average (n,) float64."""
        return self._numbers("weight").astype(np.float64)

    @cached_property
    def has_variants(self) -> bool:
        """Whether some clip is there in several sizes or places."""
        return bool(self._numbers("variant").any())

    @cached_property
    def splits(self) -> np.ndarray:
        """Split names (n,)."""
        names = self.column("split").dictionary_encode()
        return np.array(names.dictionary.to_pylist())[names.indices.to_numpy()]

    @property
    def channels(self) -> int:
        """C."""
        return self.info.latent_channels

    def __getstate__(self):
        return self.path

    def __setstate__(self, path):
        self.__init__(path)


def _read_header(path: Path) -> dict:
    try:
        header = json.loads(read_text(path / "cache.json"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no complete latent cache at {path}; make one with `sora-jax data encode --out={path}`"
        ) from error
    if header.get("format") != FORMAT:
        raise UserError(
            f"the latent cache {path} has format {header.get('format')}, which this version does not read: remove it "
            "and make it again with `sora-jax data encode`"
        )
    return header
