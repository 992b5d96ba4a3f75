"""Prepared datasets that TFDS itself cannot open: with a Video feature, or in an object store.

TFDS declares Video through TensorFlow only. A Video is stored as the sequence of its pictures, so such a dataset is
opened as one that says so: a temporary folder of links to its files, with features that read Sequence(Image) where
they read Video. Of a dataset in an object store the links lead to local copies.
"""

import json
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from sora_jax.files import as_path, is_remote, local_copy, read_text

VIDEO = "tensorflow_datasets.core.features.video_feature.Video"
SEQUENCE = "tensorflow_datasets.core.features.sequence_feature.Sequence"
IMAGE = "tensorflow_datasets.core.features.image_feature.Image"
FEATURES = "features.json"


def prepared_folder(name: str, data_dir: str) -> Path | None:
    """The folder of a dataset name[/config][:version], of its newest version; None where it is not at once found."""
    name, _, version = name.partition(":")
    root = as_path(data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser() / name
    folders = [file.parent for file in root.glob(f"{version or '*'}/{FEATURES}")]
    return max((f for f in folders if re.fullmatch(r"\d+\.\d+\.\d+", f.name)), key=_version, default=None)


def _version(folder: Path) -> list[int]:
    return [int(part) for part in folder.name.split(".")]


def needs_links(folder: Path) -> bool:
    """Whether the dataset of a folder cannot be opened where it is."""
    return is_remote(folder) or f'"{VIDEO}"' in read_text(folder / FEATURES)


def linked(folder: Path) -> TemporaryDirectory:
    """A folder of the same dataset with sequences of pictures for Videos; it goes when the object goes."""
    made = TemporaryDirectory(prefix="sora_jax-tfds-")
    for file in folder.iterdir():
        if file.name != FEATURES:
            Path(made.name, file.name).symlink_to(local_copy(file).resolve())
    features = json.loads(read_text(folder / FEATURES))
    Path(made.name, FEATURES).write_text(json.dumps(_replaced(features)), encoding="utf-8")
    return made


def _replaced(node):
    if isinstance(node, list):
        return [_replaced(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("pythonClassName") != VIDEO:
        return {name: _replaced(value) for name, value in node.items()}
    video = node.get("video", {})
    length, *frame = video.get("shape", {}).get("dimensions") or ["-1", "-1", "-1", "3"]
    image = {"dtype": video.get("dtype", "uint8"), "shape": {"dimensions": frame}}
    picture = {"pythonClassName": IMAGE, "image": image}
    return {"pythonClassName": SEQUENCE, "sequence": {"feature": picture, "length": length}}
