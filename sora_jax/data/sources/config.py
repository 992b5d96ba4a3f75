"""Options of a source."""

import math
import re
from dataclasses import dataclass

from sora_jax.errors import UserError
from sora_jax.worlds import WorldConfig

KINDS = ("folder", "webdataset", "array_record", "world")
LABELS = ("caption", "class", "both")


@dataclass(frozen=True)
class SourceConfig:
    """Which clips, and what is made of their captions and labels.

    name: "folder", "webdataset", "array_record", "world" or "tfds:NAME[:CONFIG]". path: the folder; a tar file, a
    folder of them or a pattern with * and ?; an ArrayRecord file or a folder of them; the `data_dir` of TFDS ("" is
    TFDS's own). weight: how often a clip comes in an epoch, on average. limit: at most so many entries, evenly
    spread over the source; the world needs it, and its last `world_held_out` come from the held-out scenes.

    split: of TFDS, such as "train" or "train[:10%]+test"; "" is all. media_field, caption_field, label_field: the
    fields of TFDS, of tables and of JSON that hold these; "" finds them by kind. In tar shards media_field is the
    ending of the member to take where a sample has several.

    label: a class label becomes a "caption" of kind label (`label_caption` with its name for {label}, underscores
    as spaces), a "class" number, or "both". strip_frames=N reads each picture as N frames from left to right at
    `strip_fps`, which is also the rate of frames that come without one.

    Raises UserError for values that are not allowed.
    """

    name: str = "folder"
    path: str = ""
    weight: float = 1.0
    split: str = ""
    media_field: str = ""
    caption_field: str = ""
    label_field: str = ""
    label: str = "both"
    label_caption: str = "{label}"
    strip_frames: int | None = None
    strip_fps: float = 8.0
    limit: int | None = None
    world: WorldConfig | None = None
    world_held_out: int = 0

    def __post_init__(self):
        if self.name not in KINDS and not re.fullmatch(r"tfds:\w[\w/.:-]*", self.name):
            raise UserError(f"source={self.name!r} is not allowed: {', '.join(KINDS)} or tfds:NAME[:CONFIG] is.")
        if self.name in KINDS[:3] and not self.path:
            raise UserError(f"path is not given: source={self.name} needs {_NEEDS[self.name]}.")
        if not 0 < self.weight < math.inf or not 0 < self.strip_fps < math.inf:
            raise UserError(f"weight={self.weight}, strip_fps={self.strip_fps}: finite numbers above 0 are allowed.")
        for option in ("strip_frames", "limit"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UserError(f"{option}={value} is not allowed: a whole number of at least 1 is.")
        self._check_words()
        self._check_world()

    def _check_words(self) -> None:
        if self.label not in LABELS:
            raise UserError(f"label={self.label!r} is not allowed: {', '.join(LABELS)} are.")
        if "{label}" not in self.label_caption:
            raise UserError(f"label_caption={self.label_caption!r} is not allowed: a text with {{label}} in it is.")
        if self.split and not self.name.startswith("tfds:"):
            raise UserError(f"split={self.split!r} is not allowed with source={self.name}: only with tfds:NAME it is.")

    def _check_world(self) -> None:
        if self.name == "world" and self.limit is None:
            raise UserError("limit is not given: source=world needs the number of clips.")
        if self.name == "world" and self.strip_frames:
            raise UserError(
                f"strip_frames={self.strip_frames} is not allowed with source=world: its clips are no strips."
            )
        most = self.limit if self.name == "world" else 0
        if not 0 <= self.world_held_out <= most:
            raise UserError(
                f"world_held_out={self.world_held_out} is not allowed with source={self.name}: from 0 to {most} it is."
            )


_NEEDS = {
    "folder": "a folder of videos or pictures",
    "webdataset": "a tar file, a folder of tar files or a pattern such as 'shards/*.tar'",
    "array_record": "a dataset folder, an .array_record file or a folder of them",
}
