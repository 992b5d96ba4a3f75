"""TensorFlow Datasets without TensorFlow: small datasets of our own, prepared by TFDS itself."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from fixtures_sources import decoded, entries
from PIL import Image

from sora_jax.data.reading.tracks import MediaError
from sora_jax.data.sources import SourceConfig, make_source
from sora_jax.data.sources.opened import FileMedia, Held
from sora_jax.data.sources.tfds import dataset_name
from sora_jax.data.viewing.write import write_video
from sora_jax.errors import UserError

F = tfds.features
BYTES = F.Tensor(shape=(), dtype=np.object_)


def frames(count: int, shade: int, channels: int = 3) -> np.ndarray:
    return np.stack([np.full((16, 16, channels), shade + 8 * k, np.uint8) for k in range(count)])


def images(clip: np.ndarray) -> list:
    return [Image.fromarray(picture.squeeze()) for picture in clip]


class Prepared(tfds.core.GeneratorBasedBuilder):
    """A dataset of the `examples` (split -> list) that a subclass names."""

    VERSION = tfds.core.Version("1.0.0")
    skip_registration = True
    FEATURES: dict = {}
    examples: dict = {}

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(self.FEATURES))

    def _split_generators(self, manager):
        return {split: enumerate(examples) for split, examples in self.examples.items()}

    def _generate_examples(self):
        raise NotImplementedError("the splits are their own generators")


class GreyDigits(Prepared):
    FEATURES = {"image": F.Image(shape=(16, 16, 1)), "label": F.ClassLabel(names=["zero", "the_one"])}
    examples = {
        "train": [{"image": images(frames(1, 10 * n, 1))[0], "label": n % 2} for n in range(5)],
        "test": [{"image": images(frames(1, 200, 1))[0], "label": 1}],
    }


class FilmFiles(Prepared):
    FEATURES = {"video": BYTES, "caption": F.Text(), "caption_long": F.Text(), "image": F.Image(shape=(16, 16, 3))}


class FrameTensors(Prepared):
    FEATURES = {
        "clip": F.Tensor(shape=(None, 16, 16, 1), dtype=np.uint8),
        "steps": F.Sequence(F.Image(shape=(16, 16, 3))),
        "still": F.Tensor(shape=(16, 16, 3), dtype=np.uint8),
        "captions": F.Sequence(F.Text()),
        "said": F.Sequence({"text": F.Text(), "id": F.Scalar(np.int64)}),
        "fps": F.Scalar(np.float32),
        "class": F.ClassLabel(num_classes=3),
    }
    MEDIA = {"steps": images(frames(2, 40)), "still": frames(1, 60)[0], "fps": 5.0}
    SAID = [{"text": f"said {k}", "id": k} for k in range(2)]
    examples = {
        "train": [
            {**MEDIA, "clip": frames(3, 20, 1), "captions": ["one"], "said": SAID[:1], "class": 0},
            {**MEDIA, "clip": frames(4, 20, 1), "captions": ["one", "another"], "said": SAID, "class": 1},
        ]
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    films = [write_video(root / f"{n}.mp4", frames(6, 30 * n), 8).read_bytes() for n in range(3)]
    rest = {"caption_long": "", "image": images(frames(1, 99))[0]}
    FilmFiles.examples = {"train": [{"video": film, "caption": f"film {n}"} | rest for n, film in enumerate(films)]}
    for builder in (GreyDigits, FilmFiles, FrameTensors):
        builder(data_dir=root, file_format="array_record").download_and_prepare()
    yield str(root)
    assert "tensorflow" not in sys.modules


def source(name, data_dir, **options):
    return make_source(SourceConfig(f"tfds:{name}", data_dir, **options))


def test_pictures_with_class_labels(data_dir):
    made = source("grey_digits", data_dir, label="both", label_caption="the digit {label}")
    assert made.name == f"tfds:grey_digits:{data_dir}" and len(made) == 6
    assert sorted(entry.split for entry in entries(made)) == ["test"] + ["train"] * 5
    for index, entry in enumerate(entries(made)):
        clip = decoded(made, index)
        assert clip.frames.shape == (1, 16, 16, 3) and clip.fps == 1.0
        shade = int(clip.frames[0, 0, 0, 0])
        assert (clip.frames == shade).all()
        number = 1 if entry.split == "test" else shade // 10 % 2
        assert (shade == 200) == (entry.split == "test")
        assert (entry.label, entry.label_name) == (number, ["zero", "the_one"][number])
        assert entry.captions == {"label": f"the digit {['zero', 'the one'][number]}"}
    assert len({made.open(i).content_id() for i in range(6)}) == 6


def test_splits_are_chosen_and_keep_their_names(data_dir):
    everything = entries(source("grey_digits", data_dir))
    some = source("grey_digits", data_dir, split="test+train[:2]")
    assert [entry.split for entry in entries(some)] == ["test", "train", "train"]
    files = [entry.file.removeprefix("grey_digits/") for entry in entries(some)]
    assert files == ["test/0", "train[:2]/0", "train[:2]/1"]
    train = [entry for entry in everything if entry.split == "train"]
    assert [entry.label_name for entry in entries(some)[1:]] == [entry.label_name for entry in train[:2]]
    np.testing.assert_array_equal(decoded(some, 0).frames, np.full((1, 16, 16, 3), 200))
    assert some.digest != source("grey_digits", data_dir).digest


def test_films_as_files_with_captions(data_dir):
    made = source("film_files", data_dir, media_field="video", caption_field="caption")
    for index, entry in enumerate(entries(made)):
        number = int(entry.captions["original"].split()[1])
        assert entry.captions == {"original": f"film {number}"} and entry.label is None
        clip = decoded(made, index)
        assert clip.frames.shape == (6, 16, 16, 3) and clip.fps == 8
        assert np.abs(clip.frames.astype(int) - frames(6, 30 * number)).max() <= 6
        film = Held(FilmFiles.examples["train"][number]["video"])
        assert made.open(index).content_id() == FileMedia(film).content_id()
    still = source("film_files", data_dir, media_field="image")
    np.testing.assert_array_equal(decoded(still, 0).frames, frames(1, 99))
    assert entries(still)[0].captions == {}


@pytest.mark.parametrize(
    "field, expected, fps, text, captions",
    [
        ("clip", [frames(3, 20), frames(4, 20)], 5, "captions", ["one", "another"]),
        ("steps", [frames(2, 40)] * 2, 5, "said/text", ["said 0", "said 1"]),
        ("still", [frames(1, 60)] * 2, 1, "captions", ["one", "another"]),
    ],
)
def test_sequences_of_pictures_and_tensors_are_frames(data_dir, field, expected, fps, text, captions):
    made = source("frame_tensors", data_dir, media_field=field, caption_field=text, label="class")
    for index, entry in enumerate(entries(made)):
        assert entry.captions == dict(zip(("original", "2"), captions[: entry.label + 1]))
        assert entry.label_name == str(entry.label)
        np.testing.assert_array_equal(decoded(made, index).frames, expected[entry.label])
        assert decoded(made, index).fps == fps


def test_a_video_is_read_as_the_pictures_it_is_stored_as(data_dir, tmp_path):
    """A Video cannot be declared without TensorFlow, but it is stored as Sequence(Image) is."""
    copied = shutil.copytree(Path(data_dir, "frame_tensors"), tmp_path / "frame_tensors") / "1.0.0/features.json"
    described = json.loads(copied.read_text())
    name = "tensorflow_datasets.core.features.video_feature.Video"
    content = {"dtype": "uint8", "encodingFormat": "png", "shape": {"dimensions": ["-1", "16", "16", "3"]}}
    described["featuresDict"]["features"] = {"steps": {"pythonClassName": name, "video": content}}
    copied.write_text(json.dumps(described))
    for name in ("frame_tensors", "frame_tensors:1.0.0"):  # the only feature that holds media need not be named
        made = source(name, str(tmp_path), split="train[1:]")
        assert [entry.split for entry in entries(made)] == ["train"]
        np.testing.assert_array_equal(decoded(made, 0).frames, frames(2, 40))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grey_digits", dict(split="valid"), "--split is 'valid'; it must be one of train, test, a part such as"),
        ("grey_digits", dict(split="train[0:2"), "--split is 'train[0:2'; it must be one of"),
        ("grey_digits", dict(media_field="label"), "--media-field is 'label'; it must name the video or picture of"),
        ("grey_digits", dict(caption_field="label"), "--caption-field is 'label'; it must name the text of"),
        ("grey_digits", dict(label_field="image"), "which has image (Image), label (ClassLabel)"),
        ("film_files", {}, "--media-field is not given; it must name the video or picture of tfds:film_files"),
        ("film_files", {}, "caption (Text), caption_long (Text), image (Image), video (Tensor of string)"),
        ("frame_tensors", dict(media_field="said/text"), "clip (Tensor of uint8 -1x16x16x1), fps (Scalar of float32)"),
        ("pairs", {}, "--label-field is not given; it must name the class of tfds:pairs, which has coarse (Class"),
        ("mnist", {}, 'run tfds.builder("mnist", data_dir='),
        ("sizes", {}, "it must name one of its configs: tfds:sizes:big, tfds:sizes:small"),
        ("as_tfrecord", {}, "is not prepared as ArrayRecord; run tfds.builder("),
        ("cut_off", {}, "1.0.0 cannot be read: Expecting property name"),
        ("partly", {}, "lacks grey_digits-test.array_record-00000-of-00001; run tfds.builder("),
    ],
)
def test_a_mistake_is_one_sentence(data_dir, tmp_path, name, options, message):
    digits = Path(data_dir, "grey_digits/1.0.0")
    for copy in ("sizes/big", "sizes/small", "as_tfrecord", "cut_off", "pairs", "partly"):
        shutil.copytree(digits, tmp_path / copy / "1.0.0")
    for copy in ("film_files", "grey_digits", "frame_tensors"):
        (tmp_path / copy).symlink_to(Path(data_dir, copy))
    info = tmp_path / "as_tfrecord/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    (tmp_path / "cut_off/1.0.0/features.json").write_text("{")
    (tmp_path / "partly/1.0.0/grey_digits-test.array_record-00000-of-00001").unlink()
    described = json.loads((digits / "features.json").read_text())
    described["featuresDict"]["features"]["coarse"] = described["featuresDict"]["features"]["label"]
    (tmp_path / "pairs/1.0.0/features.json").write_text(json.dumps(described, sort_keys=True))
    with pytest.raises(UserError) as raised:
        source(name, str(tmp_path), **options)
    said = str(raised.value)
    assert message in said and "\n" not in said and len(said) < 400


def test_names_with_configs_and_versions():
    names = ("tfds:mnist", "tfds:moving:big", "tfds:mnist:3.0.1", "tfds:moving:big:1.0.0", "tfds:moving/big:1.0.0")
    expected = ["mnist", "moving/big", "mnist:3.0.1", "moving/big:1.0.0", "moving/big:1.0.0"]
    assert [dataset_name(name) for name in names] == expected


def test_what_cannot_be_read_costs_one_clip(tmp_path):
    class Damaged(Prepared):
        FEATURES = {"video": BYTES, "steps": F.Sequence(F.Image()), "caption": F.Text()}
        sizes = [Image.new("RGB", (8, n)) for n in (8, 9)]
        examples = {"train": [{"video": b"no film", "steps": sizes, "caption": b"caf\xe9"}]}

    Damaged(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    for field, reason in (("video", "damaged|unreadable"), ("steps", "unreadable: .*, in the feature steps")):
        made = source("damaged", str(tmp_path), media_field=field, caption_field="caption")
        assert made.entry(0).captions == {}  # a text that is not UTF-8
        with pytest.raises(MediaError, match=reason):
            decoded(made, 0)
    (shard,) = tmp_path.glob("damaged/1.0.0/*.array_record*")
    content = shard.read_bytes()
    shard.write_bytes(content[:40] + bytes(60) + content[100:])
    made = source("damaged", str(tmp_path), media_field="video", caption_field="caption", split="train[:1]")
    assert made.entry(0).captions  # or it would be refused for want of a caption
    with pytest.raises(MediaError, match="unreadable"):
        decoded(made, 0)


def test_pictures_are_decoded_as_tfds_does(data_dir):
    made = source("grey_digits", data_dir, split="train")
    for index, example in enumerate(tfds.data_source("grey_digits", split="train", data_dir=data_dir, download=False)):
        np.testing.assert_array_equal(decoded(made, index).frames[0], np.repeat(example["image"], 3, axis=-1))
