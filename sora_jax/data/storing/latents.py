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
`low-*.array_record`                    the latent (t, h / 2, w / 2, C) of the clip at half its height and width, kept
                                        as that of the clip
======================================  ==================================================================
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sora_jax.config import check
from sora_jax.data.guides import KEY_FRAME, SKETCH, GuideCounts, Guides, counts_of
from sora_jax.data.storing.clips import clip_id_of
from sora_jax.data.storing.parts import Kind, PartWriter, ShardedWriter, start
from sora_jax.data.storing.shards import FLOATS, ShardReader
from sora_jax.data.storing.store import ClipStore
from sora_jax.errors import NotFinite, UserError

FORMAT = 3
LATENTS, TEXT, GUIDES, LOW = "latents", "text", "guides", "low"
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


@dataclass(frozen=True)
class TextInfo:
    """The pretrained text encoder of a cache: name or folder, fingerprint of its weights, width E, most tokens."""

    name: str
    fingerprint: str
    width: int
    max_tokens: int


@dataclass(frozen=True)
class CacheInfo:
    """The models and options that a cache was made with. data: digest of the dataset; factors: (time, height, width).

    tiles: size and overlap as JSON; None where no clip was cut. codes: of discrete latents the values that each channel
    can have; the index of a code is a number with a digit for each channel, the first with weight 1. guides: how many
    the cache has of each clip. low: it has each clip at half its height and width, too.
    """

    fingerprint: str
    data: str
    latent_channels: int
    factors: tuple[int, int, int]
    text: TextInfo | None = None
    tiles: dict | None = None
    codes: list[list[float]] | None = None
    guides: GuideCounts = GuideCounts()
    low: bool = False

    def header(self) -> dict:
        """Return what `cache.json` says of it, as JSON values."""
        values = asdict(self) | {"factors": list(self.factors), "format": FORMAT}
        values["guides"] = values["guides"] if self.guides else None
        optional = ("tiles", "codes", "guides", "low")
        return {name: value for name, value in values.items() if name not in optional or value}

    @staticmethod
    def of(header: Mapping) -> "CacheInfo":
        """Read what `header` returned; earlier versions wrote fewer fields."""
        kept: dict[str, Any] = {
            name: header.get(name) for name in ("fingerprint", "data", "latent_channels", "tiles", "codes")
        }
        text = header["text"] and TextInfo(**header["text"])
        guides, low = GuideCounts(**header.get("guides", {})), header.get("low", False)
        return CacheInfo(**kept, factors=tuple(header["factors"]), text=text, guides=guides, low=low)

    def to_indices(self, latent_thwC: np.ndarray) -> np.ndarray:
        """Return the indices (t, h, w) of the codes nearest to a discrete latent."""
        pairs = zip(np.moveaxis(latent_thwC, -1, 0), self._values, strict=True)
        digits = tuple(np.abs(z[..., None] - values).argmin(-1) for z, values in pairs)
        return np.ravel_multi_index(digits, tuple(map(len, self._values)), order="F").astype(np.uint32)

    def from_indices(self, indices_thw: np.ndarray) -> np.ndarray:
        """Return the latent (t, h, w, C), float32, of indices of codes."""
        digits = np.unravel_index(indices_thw, tuple(map(len, self._values)), order="F")
        pairs = zip(self._values, digits, strict=True)
        return np.stack([values[digit] for values, digit in pairs], -1).astype(np.float32)

    @property
    def _values(self) -> list[np.ndarray]:
        return [np.asarray(values) for values in self.codes or ()]


def start_cache(out: str | Path, info: CacheInfo, count: int, layout: dict | None = None) -> ShardedWriter:
    """Start a cache of `count` parts, or go on with what an earlier call with the same `info` left.

    layout: all that decides which clips are in which part.
    """
    kept = {LATENTS: True, TEXT: info.text, GUIDES: info.guides, LOW: info.low}
    files = {name: FLOATS for name, there in kept.items() if there}
    columns = COLUMNS | ({"guide_frames": "int32[]"} if info.guides else {})
    return start(out, Kind(files, columns, "cache.json"), info.header() | {"layout": layout}, count)


class GuideLatents(NamedTuple):
    """The guides of a clip: the frame of each, and its latent (1, h, w, C)."""

    frames: Sequence[int]
    latents: Sequence[np.ndarray]


def add_latent(
    writer: PartWriter,
    info: CacheInfo,
    row: Mapping,
    latent: np.ndarray,
    texts: Sequence[np.ndarray] = (),
    guides: GuideLatents = GuideLatents((), ()),
    low: np.ndarray | None = None,
) -> None:
    """Append a clip to a part of a cache.

    row: of the dataset; the columns `COPIED` are kept. latent (t, h, w, C): kept as float16. texts: an embedding (m, E)
    of each caption, where the cache has a text encoder. guides, low: where the cache has such. UserError if values are
    not finite or C is another one.
    """
    if latent.ndim != 4 or latent.shape[-1] != info.latent_channels:
        raise UserError(f"clip {row['id']!r}: latent shape {latent.shape} is not (t, h, w, {info.latent_channels})")
    latents = [latent, *guides.latents, *([] if low is None else [low])]
    if not all(np.isfinite(z).all() for z in latents):
        raise NotFinite(f"clip {row['id']!r}: its latent has values that are not finite")
    stored = [info.to_indices(z) if info.codes else z.astype(np.float16) for z in latents]
    if not all(np.isfinite(values).all() for values in stored):
        raise UserError(f"clip {row['id']!r}: its latent has values that float16 cannot hold")
    t, h, w, _ = latent.shape
    kept = {name: row[name] for name in COPIED} | {"uid": clip_id_of(row["id"]), "t": t, "h": h, "w": w}
    records = [stored[0].tobytes()]
    if info.text:
        records.append(b"".join(text.astype(np.float16).tobytes() for text in texts))
    if info.guides:
        kept |= {"guide_frames": list(guides.frames)}
        records.append(b"".join(values.tobytes() for values in stored[1 : 1 + len(guides.latents)]))
    if info.low:
        records.append(stored[-1].tobytes())
    writer.add(kept | {"text_tokens": [len(text) for text in texts]}, *records)


def finish_cache(parts: ShardedWriter, info: CacheInfo) -> bool:
    """Complete the cache if all its parts are there."""
    return parts.finish(info.header(), lambda refused: f"no clip was encoded for the latent cache {parts.out}")


class LatentCache(ClipStore):
    """A complete cache: `len`, `[i]` -> latent (t, h, w, C), and columns of the manifest. May be pickled and forked.

    UserError where the folder is missing or of another format.
    """

    info_file, format, sides = "cache.json", FORMAT, "thw"
    missing = "there is no complete latent cache at {path}; make it with `sora-jax data encode --out={path}`"

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.info = CacheInfo.of(self.header)
        self._latents, self._texts, self._guides, self._low = (
            ShardReader(self.path, prefix, self.header["parts"]) for prefix in (LATENTS, TEXT, GUIDES, LOW)
        )

    @cached_property
    def digest(self) -> str:
        """Return the digest of the clips and their order: epochs of another cache of the same clips are others."""
        identity = json.dumps([self.info.header(), self.header["digest"]], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()

    def item(self, index: int) -> np.ndarray:
        """Return the latent (t, h, w, C) of a clip."""
        return self._values(self._latents, index)

    __getitem__ = item

    def low(self, index: int) -> np.ndarray:
        """Return the latent (t, h / 2, w / 2, C) of a clip at half its height and width; UserError without such."""
        self.check_low()
        return self._values(self._low, index, 2)

    def check_low(self) -> None:
        """Raise UserError unless the cache has its clips at half their height and width, too."""
        again = "make it again with `sora-jax data encode ... --low`"
        check(self.info.low, f"the latent cache {self.path} has no low resolution, which the model reads: {again}")

    def _values(self, shards: ShardReader, index: int, scale: int = 1) -> np.ndarray:
        """Return the latent frames (n, h, w, C) in the record of a clip, whose sides are those of the clip / scale."""
        data, sides = self._read(shards, index), self.grids[index][1:] // scale
        if self.info.codes:
            return self.info.from_indices(np.frombuffer(data, np.uint32).reshape(-1, *sides))
        return np.frombuffer(data, np.float16).reshape(-1, *sides, self.info.latent_channels)

    def _read(self, shards: ShardReader, index: int) -> bytes:
        return shards.read(int(self.kept("shard")[index]), int(self.kept("record")[index]))

    def guides(self, index: int, count: int) -> Guides:
        """Return the first key frames of a clip, or, where `count` is negative, its first sketches."""
        frames = np.array(self.kept("guide_frames")[index].as_py())
        key_frames = int(counts_of(self.info.guides, self.frames[index])[0])
        first, kind = (0, KEY_FRAME) if count > 0 else (key_frames, SKETCH)
        chosen = slice(first, first + abs(count))
        return Guides(kind, frames[chosen] / self.info.factors[0], self._values(self._guides, index)[chosen])

    def text(self, index: int, caption: int) -> np.ndarray:
        """Return the embedding (m, E) float16 of a caption of a clip, by its number."""
        assert self.info.text is not None
        ends = np.cumsum(self.kept("text_tokens")[index].as_py())
        whole = np.frombuffer(self._read(self._texts, index), np.float16).reshape(-1, self.info.text.width)
        return whole[ends[caption - 1] if caption else 0 : ends[caption]]

    def check(self, fingerprint: str) -> None:
        """Raise UserError unless the cache was made by the autoencoder and preprocessing of this fingerprint."""
        if fingerprint != self.info.fingerprint:
            raise UserError(
                f"the latent cache {self.path} was made by another autoencoder (fingerprint "
                f"{self.info.fingerprint[:12]}, this run has {fingerprint[:12]}); remove it and make it again with "
                f"`sora-jax data encode --autoencoder=RUN --data=DATASET --out={self.path}`, or use the autoencoder "
                "that made it"
            )

    @property
    def frames(self) -> np.ndarray:
        """Return the frames of each clip before it was encoded, (n,) int32."""
        return self.kept("frames")
