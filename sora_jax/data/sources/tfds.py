"""Read datasets that TensorFlow Datasets (TFDS) has prepared as ArrayRecord, without TensorFlow.

Options name the features to read. Their types come from `features.json`, their values from the raw tf.Example, so a
picture stays the file that was stored, and a Video, which TFDS opens with TensorFlow only, is a sequence of pictures.
"""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.config import check
from sora_jax.data.reading.media import SpanRule
from sora_jax.data.reading.tracks import MediaError, as_media_error, reason
from sora_jax.data.sources.config import SourceConfig
from sora_jax.data.sources.entries import Entry
from sora_jax.data.sources.opened import FileMedia, FramesMedia, Held
from sora_jax.data.sources.tables import clean
from sora_jax.errors import UserError
from sora_jax.files import as_path, local_copy, read_text

FILES, TEXTS = ("Text", "Tensor of string"), ("Sequence of Text", "Sequence of Tensor of string")
MEDIA = {"Image": "image", "Video": "pictures", "Sequence of Image": "pictures", **dict.fromkeys(FILES, "file")}
FRAMES = re.compile(r"Tensor of uint8 (-?\d+x){2,3}[13]")  # (T, H, W, C) or (H, W, C) of 1 or 3 channels


class TfdsReader:
    """List the examples of the chosen splits in the order of the prepared files.

    The medium is `media_field`, or the only feature beside texts that can hold one. The caption is `caption_field`. The
    class is `label_field`, or the only ClassLabel. An entry reads the record of its example and decodes no media.

    Raises:
        UserError: the dataset is not prepared; a split or feature is not there; a feature has to be named.
    """

    def __init__(self, config: SourceConfig):
        from array_record.python.array_record_data_source import ArrayRecordDataSource
        from tensorflow_datasets.core.dataset_info import read_proto_from_builder_dir

        folder = _prepared_folder(config)
        try:
            info = read_proto_from_builder_dir(os.fspath(folder))
            features = dict(_features(json.loads(read_text(folder / "features.json"))))
        except Exception as error:  # TFDS and its file systems raise many types
            raise UserError(f"{folder} cannot be read: {reason(error)}; {_command(config)}") from error
        sizes, self._splits, files = _choose_splits(info, folder, config)
        self._media, self._caption, self._label = _choose_features(features, config)
        self._type, self._strip_fps, self._name = features[self._media], config.strip_fps, dataset_name(config.name)
        rates = (name for name in ("fps", "frame_rate") if features.get(name, "").startswith("Scalar"))
        self._rate = next(rates, "")
        table = folder / f"{self._label.replace('/', '-')}.labels.txt"
        self._classes = dict(enumerate(read_text(table).split("\n"))) if self._label and table.is_file() else {}
        self.classes = {(name, number) for number, name in self._classes.items() if name}
        self._records = ArrayRecordDataSource(files)
        self.refused: list[tuple[str, str]] = []
        # The digest has the form of earlier versions, so that a dataset that they built is recognised.
        name = "/".join(filter(None, (info.name, info.config_name, info.version)))
        digest = f"({name!r}, {sizes!r}, {self._splits!r}, Plan(media={self._media!r}, kind={_kind(self._type)!r}, "
        digest += f"fps={config.strip_fps!r}, rate={self._rate!r}, "
        digest += f"said={tuple(filter(None, (self._caption, self._label)))!r}, label={self._label!r}))"
        self.digest = hashlib.blake2b(digest.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return sum(count for _, count in self._splits)

    def entry(self, index: int) -> Entry:
        ends = list(accumulate(count for _, count in self._splits))
        split, count = self._splits[place := bisect_right(ends, index)]
        captions, label = {}, None
        try:
            texts, labels = self._values(index, self._caption, self._label)
            lines = enumerate((clean(text.decode()) for text in texts), 1)
            captions = {str(n) if n > 1 else "original": line for n, line in lines if line}
            label = next((value for value in labels if value >= 0), None)
        except MediaError:
            captions = {"original": ""}  # so that the damage, which `open` reports, is the reason of the refusal
        except UnicodeDecodeError:
            captions = {}
        class_name = None if label is None else self._classes.get(label, str(label))
        file = f"{self._name}/{split}/{index - ends[place] + count}"
        return Entry(file, captions, label, class_name, split.partition("[")[0])

    def open(self, index: int) -> FileMedia | FramesMedia:
        files, rate = self._values(index, self._media, self._rate)
        kind = _kind(self._type)
        if not files:
            raise MediaError(f"no frames: the feature {self._media} is empty")
        if kind in ("image", "file"):
            return FileMedia(Held(files[0]))
        try:
            if kind == "pictures":
                clips = [FileMedia(Held(file)).decode(SpanRule(max_frames=1), None) for file in files]
                frames = np.concatenate([clip.frames for clip in clips if clip])
            else:
                shape = [int(n) for n in self._type.split()[-1].split("x")]
                frames = np.array(files, np.uint8).reshape(-1, *shape[-3:])
                frames = np.repeat(frames, 3 // shape[-1], axis=-1)
        except ValueError as error:
            raise MediaError(f"unreadable: {reason(error)}, in the feature {self._media}") from error
        return FramesMedia(frames, 1.0 if kind == "frame" else float([*rate, 0][0] or self._strip_fps))

    @as_media_error()
    def _values(self, index: int, *names: str) -> list[Sequence]:
        """Return the stored values of each named feature of an example, none of "". Raises MediaError."""
        from tensorflow_datasets.proto import tf_example_pb2

        stored = tf_example_pb2.Example.FromString(self._records[index]).features.feature
        return [getattr(stored[name], stored[name].WhichOneof("kind") or "bytes_list").value for name in names]


def _choose_splits(
    info: Any, folder: Path, config: SourceConfig
) -> tuple[tuple[int, ...], list[tuple[str, int]], list]:
    """Return the bytes of all splits, names and counts of those that are read, and what to read of which local file."""
    import tensorflow_datasets as tfds

    known_formats = (info.file_format, *info.alternative_file_formats)
    check("array_record" in known_formats, f"{folder} is not prepared as ArrayRecord; {_command(config)}")
    template = tfds.core.ShardedFileTemplate(dataset_name=info.name, data_dir=folder, filetype_suffix="array_record")
    known = tfds.core.SplitDict.from_proto(repeated_split_infos=info.splits, filename_template=template)
    try:
        names = list(known) if config.split in ("", "all") else config.split.split("+")
        chosen = {name: known[name].file_instructions for name in names}
    except Exception as error:  # TFDS raises ValueError and AssertionError
        allowed = f"it must be one of {', '.join(known)}, a part such as train[:10%], or several joined by +"
        raise UserError(f"--split is {config.split!r}; {allowed}") from error
    paths = {file.filename: as_path(file.filename) for files in chosen.values() for file in files}
    missing = [path.name for path in paths.values() if not path.is_file()]
    check(paths and not missing, f"{folder} lacks {', '.join(missing[:1]) or 'examples'}; {_command(config)}")
    local = {name: os.fspath(local_copy(path)) for name, path in paths.items()}
    files = [replace(file, filename=local[file.filename]) for files in chosen.values() for file in files]
    splits = [(name, sum(file.take for file in files)) for name, files in chosen.items()]
    return tuple(known[name].num_bytes for name in sorted(known)), splits, files


def _features(node: dict, path: str = "", above: str = "") -> Iterator[tuple[str, str]]:
    """Yield path in records (captions/text) and type, in words, of the features that `features.json` describes."""
    if "featuresDict" in node:
        for name, inner in node["featuresDict"]["features"].items():
            yield from _features(inner, f"{path}/{name}" if path else name, above)
    elif "sequence" in node:
        yield from _features(node["sequence"]["feature"], path, f"{above}Sequence of ")
    else:
        words, tensor = f"{above}{node['pythonClassName'].rpartition('.')[2]}", node.get("tensor")
        content = tensor or node.get("image") or node.get("video") or {"dtype": "uint8"}
        if tensor or content.get("dtype", "uint8") not in ("uint8", "uint16"):
            words += f" of {content['dtype']}"
        shape = "x".join(tensor["shape"].get("dimensions", ())) if tensor else ""
        yield path, f"{words} {shape}".rstrip()


def _kind(words: str) -> str:
    """Return how a feature of this type holds media, "" if not at all."""
    tensor = {3: "frames", 2: "frame"}[words.count("x")] if FRAMES.fullmatch(words) else ""
    return MEDIA.get(words, tensor)


def _choose_features(features: dict[str, str], config: SourceConfig) -> tuple[str, str, str]:
    """Return the features that hold the medium, the caption and the class, "" for none. Raises UserError."""
    listing = ", ".join(f"{name} ({kind})" for name, kind in features.items())

    def choose(option: str, what: str, allowed: list[str], default: list[str]) -> str:
        given = getattr(config, f"{option}_field")
        found = [name for name in allowed if name == given] if given else default
        said = f"--{option}-field {f'is {given!r}' if given else 'is not given'}"
        check(len(found) == 1, f"{said}; it must name the {what} of {config.name}, which has {listing}")
        return found[0]

    held = [name for name, kind in features.items() if _kind(kind)]
    texts = [name for name, kind in features.items() if kind in FILES + TEXTS]
    classes = [name for name, kind in features.items() if kind == "ClassLabel"]
    media = choose("media", "video or picture", held, [name for name in held if features[name] != "Text"])
    caption = choose("caption", "text", texts, [""])
    return media, caption, choose("label", "class", classes, classes or [""])


def _prepared_folder(config: SourceConfig) -> Path:
    """Return the folder of the newest prepared version that the name allows."""
    name, _, version = dataset_name(config.name).partition(":")
    root = as_path(config.path or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser() / name
    found = [file.parent for pattern in ("*", "*/*") for file in root.glob(f"{pattern}/features.json")]
    found = [folder for folder in found if re.fullmatch(re.escape(version) or r"\d+\.\d+\.\d+", folder.name)]
    check(found, f"{config.name} is not prepared in {root}; {_command(config)}")
    known = ", ".join(sorted({f"tfds:{name}:{folder.parent.name}" for folder in found}))
    check("," not in known, f"--source is {config.name!r}; it must name one of its configs: {known}")
    return max(found, key=lambda folder: [int(part) for part in folder.name.split(".")])


def _command(config: SourceConfig) -> str:
    where = f"data_dir={config.path!r}, " if config.path else ""
    return f'run tfds.builder("{dataset_name(config.name)}", {where}file_format="array_record").download_and_prepare()'


def dataset_name(source: str) -> str:
    """Convert "tfds:NAME[:CONFIG][:VERSION]" to the name of TFDS, name/config:version."""
    return re.sub(r":(?!\d+\.\d+\.\d+$)", "/", source.removeprefix("tfds:"))
