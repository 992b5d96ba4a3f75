"""Datasets prepared by TensorFlow Datasets as ArrayRecord, read without TensorFlow.

Records are parsed for the fields that are needed, and pictures stay the files that they were stored as.
"""

import hashlib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sora_jax.data.reading.media import DecodedClip, FitClip, SpanRule
from sora_jax.data.reading.tracks import MediaError, reason
from sora_jax.data.sources.config import SourceConfig
from sora_jax.data.sources.entries import Entry
from sora_jax.data.sources.opened import FileMedia, FramesMedia, Held
from sora_jax.data.sources.tables import Annotations, Fields, annotations
from sora_jax.data.sources.tfds_video import linked, needs_links, prepared_folder
from sora_jax.errors import UserError

VIDEO_NAMES = ("video", "clip", "mp4")
RATE_NAMES = ("fps", "frame_rate")


class Key(NamedTuple):
    """What is opened, once a process."""

    name: str
    data_dir: str
    split: str


class TfdsReader:
    """All examples of the splits, which they keep by name, in the order of the prepared files.

    Media is the field named by media_field, or by kind the first of: video, clip or mp4 (bytes of a file, a sequence
    of pictures or a uint8 tensor (T, H, W, C)), another such tensor or sequence, `image`, another picture. Frames come
    at the rate of a field `fps`, or at strip_fps. The caption is caption_field, or caption, text, captions.

    An entry reads its example's record, the media in it undecoded. Raises UserError for a dataset that is not
    prepared, for an unknown split, and where there is no such field.
    """

    def __init__(self, config: SourceConfig):
        self._key = Key(dataset_name(config.name), config.path, config.split)
        opened = _opened(self._key, os.getpid())
        self.refused: list[tuple[str, str]] = []
        self._plan = _plan(opened.features, config)
        self._fields = Fields(config.caption_field, self._plan.label)
        self._ends = np.cumsum([len(source) for _, source in opened.splits])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def entry(self, index: int) -> Entry:
        split, place = self._find(index)
        opened = _opened(self._key, os.getpid())
        name = opened.splits[split][0]
        shown = f"{self._key.name}/{name}/{place}"
        try:
            row = _parse(opened, self._plan.said, split, place)
            said = annotations(_as_text(row), self._fields)
        except (MediaError, ValueError):  # a damaged record says so when it is opened; a text not in UTF-8 is none
            said = Annotations()
        return Entry(shown, said.captions, *_class(opened.features, self._plan.label, said.label), name.split("[")[0])

    def open(self, index: int) -> "TfdsMedia":
        return TfdsMedia(self._key, self._plan, *self._find(index))

    def digest(self) -> str:
        opened = _opened(self._key, os.getpid())
        splits = [(name, len(source)) for name, source in opened.splits]
        listing = repr((opened.full_name, opened.sizes, splits, self._plan))
        return hashlib.blake2b(listing.encode(), digest_size=16).hexdigest()

    def _find(self, index: int) -> tuple[int, int]:
        split = int(np.searchsorted(self._ends, index, side="right"))
        return split, index - (int(self._ends[split - 1]) if split else 0)


class Plan(NamedTuple):
    """Which fields are read: of media one, its kind, and the frame rate of frames; what is said of it."""

    media: str
    kind: str
    fps: float
    rate: str
    said: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class TfdsMedia:
    """The media of one example."""

    key: Key
    plan: Plan
    split: int
    place: int

    def content_id(self) -> str:
        return self._media().content_id()

    def decode(self, rule: SpanRule, fit: FitClip | None) -> DecodedClip | None:
        return self._media().decode(rule, fit)

    def _media(self) -> FileMedia | FramesMedia:
        plan = self.plan
        wanted = (plan.media, plan.rate) if plan.rate else (plan.media,)
        row = _parse(_opened(self.key, os.getpid()), wanted, self.split, self.place, plan.media)
        value, fps = row[plan.media], float(row.get(plan.rate) or plan.fps)
        if plan.kind in ("file", "image"):
            return FileMedia(Held(value))
        if plan.kind == "frame":
            return FramesMedia(_colour(np.asarray(value)[None]), 1.0)
        return FramesMedia(_colour(np.asarray(value)) if plan.kind == "frames" else _pictures(value), fps)


def _colour(frames: np.ndarray) -> np.ndarray:
    if not frames.size:
        raise MediaError("no frames: the tensor is empty")
    return frames if frames.shape[-1] == 3 else np.repeat(frames, 3, axis=-1)


def _pictures(files: list[bytes]) -> np.ndarray:
    if not len(files):
        raise MediaError("no frames: the sequence is empty")
    try:
        return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    except Exception as error:  # Pillow raises many types for damage
        raise MediaError(f"damaged: {reason(error)}, in a sequence of pictures") from error


def dataset_name(source: str) -> str:
    """TFDS's own name, name/config:version, of "tfds:NAME[:CONFIG][:VERSION]"."""
    name, *rest = source.removeprefix("tfds:").split(":")
    config = [part for part in rest if not re.fullmatch(r"\d+\.\d+\.\d+", part)]
    version = [part for part in rest if part not in config]
    return "/".join([name, *config]) + "".join(f":{part}" for part in version)


@dataclass(frozen=True)
class Opened:
    """A prepared dataset: features, and (name, records) of each split."""

    full_name: str
    features: Mapping
    sizes: tuple[int, ...]
    splits: list[tuple[str, Any]]
    folder: Any = None  # kept as long as it is read from


@lru_cache(maxsize=8)
def _opened(key: Key, process: int) -> Opened:
    """Opened anew in every process, like all files."""
    names = key.split.split("+") if key.split not in ("", "all") else None
    try:
        sources, folder = _data_sources(key, names)
    except Exception as error:  # whatever TFDS and its file systems raise for what they do not find
        raise _mistake(key, error) from error
    splits = list(zip(names, sources)) if names else list(sources.items())
    if not splits:
        raise UserError(f"source=tfds:{key.name} has no splits: prepare it again.")
    info = splits[0][1].dataset_info
    sizes = tuple(split.num_bytes for _, split in sorted(info.splits.items()))
    return Opened(info.full_name, info.features, sizes, splits, folder)


def _data_sources(key: Key, names: list[str] | None):
    """(records by split, or a list in the order of names; the folder they need, if any)."""
    import tensorflow_datasets as tfds

    raw = {"split": names, "deserialize_method": tfds.decode.DeserializeMethod.RAW_BYTES}
    prepared = prepared_folder(key.name, key.data_dir)
    if prepared and needs_links(prepared):
        folder = linked(prepared)
        return tfds.builder_from_directory(folder.name).as_data_source(**raw), folder
    return tfds.data_source(key.name, data_dir=key.data_dir or None, download=False, **raw), None


def _mistake(key: Key, error: Exception) -> UserError:
    where = f"data_dir={key.data_dir!r}, " if key.data_dir else ""
    run = f'tfds.builder("{key.name}", {where}file_format="array_record").download_and_prepare()'
    text = str(error)
    if isinstance(error, ImportError) and prepared_folder(key.name, key.data_dir):
        return UserError(
            f"source=tfds:{key.name} is read by code that needs TensorFlow ({reason(error)}): give path= the folder in"
            " which it stands prepared, and its version as tfds:NAME:VERSION."
        )
    if "split" in text.lower() and "Unknown" in text or "parsing split" in text:
        said = " ".join(text.splitlines()[0].split()).rstrip(".")
        return UserError(f"split={key.split!r} is not one of tfds:{key.name}: {said}.")
    if isinstance(error, NotImplementedError):
        return UserError(f"source=tfds:{key.name} is not prepared as ArrayRecord: run {run}.")
    place = f"path={key.data_dir!r}" if key.data_dir else "TFDS's own data_dir"
    return UserError(f"source=tfds:{key.name} is not prepared in {place} ({reason(error)[:80]}): run {run}.")


def _parse(opened: Opened, fields: tuple[str, ...], split: int, place: int, media: str = "") -> dict:
    """The fields of one example; pictures and films as the bytes that they are stored as."""
    import tensorflow_datasets as tfds

    parts = {name: _as_stored(opened.features[name]) if name == media else opened.features[name] for name in fields}
    try:
        return tfds.features.FeaturesDict(parts).deserialize_example_np(opened.splits[split][1][place])
    except Exception as error:  # a record of other features, or a damaged file
        raise MediaError(f"unreadable: {reason(error)}") from error


def _as_stored(feature):
    """A feature that leaves pictures as the files that they are."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Image):
        return tfds.features.Text()
    if isinstance(feature, tfds.features.Sequence):
        return tfds.features.Sequence(tfds.features.Text())
    return feature


def _plan(features: Mapping, config: SourceConfig) -> Plan:
    media = _media_field(features, config)
    rate = next((name for name in RATE_NAMES if name in features and features[name].shape == ()), "")
    label = _label_field(features, config)
    named = (config.caption_field,) if config.caption_field else ("caption", "text", "captions")
    said = [name for name in features if name in named or name.startswith("caption_")]
    said = [name for name in said if name != media and _is_text(features[name])]
    if config.caption_field and config.caption_field not in said:
        texts = ", ".join(name for name in features if _is_text(features[name])) or "none"
        raise UserError(f"caption_field={config.caption_field!r} is not a text of {config.name}: {texts} is.")
    return Plan(media, _kind(features[media]), config.strip_fps, rate, (*said, *filter(None, [label])), label)


def _media_field(features: Mapping, config: SourceConfig) -> str:
    kinds = {name: _kind(feature) for name, feature in features.items()}
    moving = [name for name, kind in kinds.items() if kind in ("frames", "pictures")]
    still = [name for name, kind in kinds.items() if kind in ("image", "frame")]
    found = [name for name in VIDEO_NAMES if kinds.get(name)] + moving + sorted(still, key=lambda name: name != "image")
    if config.media_field:
        found = [name for name in features if name == config.media_field and kinds[name]]
    if not found:
        wanted = f"media_field={config.media_field!r}" if config.media_field else "a video or image"
        raise UserError(f"{config.name} has no field for {wanted}: its fields are {', '.join(features)}.")
    return found[0]


def _kind(feature) -> str:
    """How a feature holds media: a "file", "frames" or a "frame" as numbers, "pictures", an "image", "" for not."""
    import tensorflow_datasets as tfds

    shape = getattr(feature, "shape", None)
    if isinstance(feature, tfds.features.Image):
        return "image" if feature.np_dtype in (np.uint8, np.uint16) else ""
    if isinstance(feature, tfds.features.Sequence):
        return "pictures" if isinstance(feature.feature, tfds.features.Image) else ""
    if isinstance(feature, tfds.features.Tensor) and shape == ():
        return "file" if feature.np_dtype == np.object_ else ""
    tensor = isinstance(feature, tfds.features.Tensor) and shape[-1] in (1, 3) and feature.np_dtype == np.uint8
    return {4: "frames", 3: "frame"}.get(len(shape), "") if tensor else ""


def _is_text(feature) -> bool:
    """A text, a sequence of them, or of records that have one (`captions` of COCO)."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Sequence):
        inner = feature.feature
        return any(_is_text(inner[name]) for name in _INNER if name in inner) if _nested(inner) else _is_text(inner)
    return isinstance(feature, tfds.features.Tensor) and feature.shape == () and feature.np_dtype == np.object_


_INNER = ("text", "caption")


def _nested(feature) -> bool:
    import tensorflow_datasets as tfds

    return isinstance(feature, tfds.features.FeaturesDict)


def _as_text(row: dict) -> dict:
    """Bytes as str, sequences of them as lists. Raises UnicodeDecodeError."""
    return {name: _text_of(value) for name, value in row.items()}


def _text_of(value):
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return next(_text_of(value[name]) for name in _INNER if name in value)
    return [_text_of(item) for item in value] if isinstance(value, list | np.ndarray) else value


def _label_field(features: Mapping, config: SourceConfig) -> str:
    import tensorflow_datasets as tfds

    classes = [name for name, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    wanted = config.label_field
    if wanted and wanted not in classes:
        raise UserError(
            f"label_field={wanted!r} is not a class label of {config.name}: {', '.join(classes) or 'none'} is."
        )
    return wanted or ("label" if "label" in classes else next(iter(classes), ""))


def _class(features: Mapping, field: str, number: int | None) -> tuple[int | None, str | None]:
    """(number, name) of a class; a dataset may come without the names."""
    named = number is not None and features[field].names
    return number, features[field].int2str(number) if named else None
