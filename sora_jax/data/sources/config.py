"""Options of a source."""

import math
import re
from dataclasses import dataclass

from sora_jax.config import check, choose
from sora_jax.errors import UserError
from sora_jax.worlds import WorldConfig

KINDS = {  # -> what --path must be
    "folder": "a folder of videos or pictures",
    "webdataset": "a tar file, a folder of tar files or a pattern such as 'shards/*.tar'",
    "array_record": "a dataset folder",
    "world": "",
}
LABELS = ("caption", "class", "both")


@dataclass(frozen=True)
class SourceConfig:
    """Which clips to read, and how to use their captions and class labels; UserError for wrong values."""

    name: str = "folder"  # folder, webdataset, array_record, world or tfds:NAME[:CONFIG]; --source
    path: str = ""  # folder; file; pattern of tar files; dataset folder; `data_dir` of TFDS ("": its default)
    weight: float = 1.0  # mean number of times that a clip comes in an epoch
    split: str = ""  # splits of TFDS, such as "train" or "train[:10%]+test"; "": all
    media_field: str = ""  # feature of TFDS with the media; ending of the file to take from tar samples with several
    caption_field: str = ""  # feature, column or key with the caption; "": the usual names (of TFDS, none)
    label_field: str = ""  # feature, column or key with the class; "": label (of TFDS, the only ClassLabel)
    label: str = "both"  # make of a class label a "caption" of kind label, a "class" number, or "both"
    label_caption: str = "{label}"  # caption of a class; {label} becomes its name
    strip_frames: int | None = None  # split each picture into so many frames, from left to right
    strip_fps: float = 8.0  # frame rate of such strips, and of frames that come without one
    limit: int | None = None  # maximum number of entries, evenly spread over the source; number of clips of the world
    world: WorldConfig | None = None  # variant of the embedded world
    world_held_out: int = 0  # how many clips, the last of `limit`, come from the held-out scenes of the world

    def __post_init__(self):
        if not re.fullmatch(r"tfds:\w[\w/.:-]*", self.name):
            check(self.name in KINDS, f"--source is {self.name!r}; it must be {', '.join(KINDS)} or tfds:NAME[:CONFIG]")
            needed = KINDS[self.name]
            check(self.path or not needed, f"--path is not given; with --source={self.name} it must be {needed}")
            check(not self.split, f"--split is {self.split!r}; it must be left out with --source={self.name}")
        for option in ("weight", "strip_fps"):
            value = getattr(self, option)
            check(0 < value < math.inf, f"{_typed(option)} is {value}; it must be finite and above 0")
        for option in ("strip_frames", "limit"):
            value = getattr(self, option)
            check(value is None or value >= 1, f"{_typed(option)} is {value}; it must be at least 1")
        choose("--label", self.label, dict.fromkeys(LABELS))
        words = "it must hold {label}, where the name of the class goes"
        check("{label}" in self.label_caption, f"--label-caption is {self.label_caption!r}; {words}")
        self._check_world()

    def _check_world(self) -> None:
        most = 0
        if self.name == "world":
            if self.limit is None:
                raise UserError("--limit is not given; with --source=world it must be the number of clips")
            most, strip = self.limit, self.strip_frames
            check(not strip, f"--strip-frames is {strip}; it must be left out with --source=world")
        held_out = self.world_held_out
        at = f"with --source={self.name} it must be from 0 to {most}"
        check(0 <= held_out <= most, f"--world-held-out is {held_out}; {at}")


def _typed(option: str) -> str:
    return f"--{option.replace('_', '-')}"
