"""Options of a source."""

import math
import re
from dataclasses import dataclass

from sora_jax.config import check
from sora_jax.worlds.table import AnyWorld, count_of

KINDS = {  # -> what --path must be
    "folder": "a folder of videos or pictures",
    "webdataset": "a tar file, a folder of tar files or a pattern such as 'shards/*.tar'",
    "array_record": "a dataset folder",
    "world": "",
}


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
    world: AnyWorld | None = None  # the world that is drawn, and its variant
    world_held_out: int = 0  # how many clips, the last of `limit`, come from the held-out scenes of the world

    def __post_init__(self):
        world, held_out = self.name == "world", self.world_held_out
        has = count_of(self.world) if world and self.world else None  # training clips; None: without end
        enough = not has or (self.limit or 0) - held_out <= has
        tfds, needed = re.fullmatch(r"tfds:\w[\w/.:-]*", self.name), KINDS.get(self.name)
        here, most = f"with --source={self.name} it must be", (self.limit or 0) if world else 0
        without = f"it must be left out with --source={self.name}"
        above, some = "it must be finite and above 0", "it must be at least 1"
        holds = "it must hold {label}, where the name of the class goes"
        for option, value, fits, allowed in (
            ("source", self.name, tfds or needed is not None, f"it must be {', '.join(KINDS)} or tfds:NAME[:CONFIG]"),
            ("path", self.path, self.path or not needed, f"{here} {needed}"),
            ("split", self.split, tfds or not self.split, without),
            ("weight", self.weight, 0 < self.weight < math.inf, above),
            ("strip-fps", self.strip_fps, 0 < self.strip_fps < math.inf, above),
            ("strip-frames", self.strip_frames, self.strip_frames is None or self.strip_frames >= 1, some),
            ("strip-frames", self.strip_frames, not (world and self.strip_frames), without),
            ("limit", self.limit, self.limit is None or self.limit >= 1, some),
            ("limit", self.limit, self.limit or not world, f"{here} the number of clips"),
            ("limit", self.limit, enough, f"{here} at most {has} training clips"),
            ("label", self.label, self.label in ("caption", "class", "both"), "it must be caption, class or both"),
            ("label-caption", self.label_caption, "{label}" in self.label_caption, holds),
            ("world-held-out", held_out, 0 <= held_out <= most, f"{here} from 0 to {most}"),
        ):
            given = "is not given" if value in ("", None) else f"is {value!r}"
            check(fits, f"--{option} {given}; {allowed}")
