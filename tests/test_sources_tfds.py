"""TensorFlow Datasets without TensorFlow: small datasets of our own, prepared for real."""

import json
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from operator import methodcaller
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from sora_jax.data.reading.media import SpanRule
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
    examples = {
        "train": [
            {
                "clip": frames(3 + n, 20, 1),
                "steps": images(frames(2, 40)),
                "still": frames(1, 60)[0],
                "captions": ["one", "another"][: n + 1],
                "said": [{"text": f"said {k}", "id": k} for k in range(n + 1)],
                "fps": 5.0,
                "class": n,
            }
            for n in range(2)
        ]
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    films = [write_video(root / f"{n}.mp4", frames(6, 30 * n), 8).read_bytes() for n in range(3)]
    still = images(frames(1, 99))[0]
    FilmFiles.examples = {
        "train": [
            {"video": film, "caption": f"film {n}", "caption_long": "", "image": still} for n, film in enumerate(films)
        ]
    }
    for builder in (GreyDigits, FilmFiles, FrameTensors):
        builder(data_dir=root, file_format="array_record").download_and_prepare()
    yield str(root)
    assert "tensorflow" not in sys.modules


def source(name, data_dir, **options):
    return make_source(SourceConfig(f"tfds:{name}", data_dir, **options))


def entries(made):
    return [made.entry(i) for i in range(len(made))]


def decoded(made, index):
    return made.open(index).decode(SpanRule(), None)


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


def test_pictures_of_a_dataset_may_be_strips(data_dir):
    made = source("grey_digits", data_dir, strip_frames=4, strip_fps=2.0)
    assert decoded(made, 0).frames.shape == (4, 16, 4, 3) and decoded(made, 0).fps == 2.0


def test_splits_are_chosen_and_keep_their_names(data_dir):
    everything = entries(source("grey_digits", data_dir))
    some = source("grey_digits", data_dir, split="test+train[:2]")
    assert [entry.split for entry in entries(some)] == ["test", "train", "train"]
    train = [entry for entry in everything if entry.split == "train"]
    assert [entry.label_name for entry in entries(some)[1:]] == [entry.label_name for entry in train[:2]]
    np.testing.assert_array_equal(decoded(some, 0).frames, np.full((1, 16, 16, 3), 200))
    assert some.digest() != source("grey_digits", data_dir).digest()


def test_films_as_files_with_captions(data_dir):
    made = source("film_files", data_dir)
    for index, entry in enumerate(entries(made)):
        number = int(entry.captions["original"].split()[1])
        assert entry.captions == {"original": f"film {number}"} and entry.label is None
        clip = decoded(made, index)
        assert clip.frames.shape == (6, 16, 16, 3) and clip.fps == 8
        assert np.abs(clip.frames.astype(int) - frames(6, 30 * number)).max() <= 6
        assert (
            made.open(index).content_id() == FileMedia(Held(FilmFiles.examples["train"][number]["video"])).content_id()
        )
    still = source("film_files", data_dir, media_field="image", caption_field="caption")
    np.testing.assert_array_equal(decoded(still, 0).frames, frames(1, 99))


def test_frames_as_tensors_and_as_pictures(data_dir):
    made = source("frame_tensors", data_dir, label="class")
    for index, entry in enumerate(entries(made)):
        number = entry.label
        assert entry.captions == [{"original": "one"}, {"original": "one", "2": "another"}][number]
        clip = decoded(made, index)
        np.testing.assert_array_equal(clip.frames, frames(3 + number, 20))
        assert clip.fps == 5.0 and entry.label_name == str(number)
    steps = source("frame_tensors", data_dir, media_field="steps", caption_field="said")
    np.testing.assert_array_equal(decoded(steps, 0).frames, frames(2, 40))
    assert sorted(len(entry.captions) for entry in entries(steps)) == [2, 3]  # with that of the label
    assert entries(steps)[0].captions["original"] == "said 0"
    still = source("frame_tensors", data_dir, media_field="still")
    np.testing.assert_array_equal(decoded(still, 0).frames, frames(1, 60))
    assert len({made.open(0).content_id(), steps.open(0).content_id(), still.open(0).content_id()}) == 3


def test_videos_are_read_as_the_pictures_they_are_stored_as(data_dir, tmp_path):
    """A Video cannot be declared without TensorFlow, but it is stored as Sequence(Image) is."""
    copied = shutil.copytree(Path(data_dir, "frame_tensors"), tmp_path / "frame_tensors") / "1.0.0/features.json"
    features = json.loads(copied.read_text())
    shape = {"dimensions": ["-1", "16", "16", "3"]}
    name = "tensorflow_datasets.core.features.video_feature.Video"
    video = {"pythonClassName": name, "video": {"dtype": "uint8", "encodingFormat": "png", "shape": shape}}
    features["featuresDict"]["features"]["steps"] = video
    copied.write_text(json.dumps(features))
    for made in (source(name, str(tmp_path), media_field="steps") for name in ("frame_tensors", "frame_tensors:1.0.0")):
        assert len(made) == 2
        np.testing.assert_array_equal(decoded(made, 1).frames, frames(2, 40))
    some = source("frame_tensors", str(tmp_path), media_field="steps", split="train[1:]")
    assert [entry.split for entry in entries(some)] == ["train"]


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("no_such_set", {}, r'not prepared in path=.*run tfds.builder\("no_such_set", data_dir='),
        ("mnist", {}, r'run tfds.builder\("mnist", data_dir=.*file_format="array_record"'),
        ("grey_digits", dict(split="valid"), "split='valid'.*train"),
        ("grey_digits", dict(split="train[0:2"), "split='train"),
        ("grey_digits", dict(media_field="label"), "media_field='label'.*image, label"),
        ("grey_digits", dict(caption_field="label"), "caption_field='label'.*none is"),
        ("film_files", dict(label_field="caption"), "label_field='caption'.*none is"),
    ],
)
def test_mistakes_are_told_in_a_sentence(data_dir, name, options, match):
    with pytest.raises(UserError, match=match) as raised:
        source(name, data_dir, **options)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_names_with_configs_and_versions():
    assert dataset_name("tfds:mnist") == "mnist"
    assert dataset_name("tfds:moving:big") == "moving/big"
    assert dataset_name("tfds:mnist:3.0.1") == "mnist:3.0.1"
    assert dataset_name("tfds:moving:big:1.0.0") == dataset_name("tfds:moving/big:1.0.0") == "moving/big:1.0.0"


def test_a_damaged_file_is_a_media_error(data_dir, tmp_path):
    class Damaged(Prepared):
        FEATURES = {"video": BYTES, "caption": F.Text()}
        examples = {"train": [{"video": b"no film", "caption": b"caf\xe9"}]}

    Damaged(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    made = source("damaged", str(tmp_path))
    assert made.entry(0).captions == {}
    with pytest.raises(MediaError):
        decoded(made, 0)


def test_a_dataset_is_read_in_another_process(data_dir):
    made = source("grey_digits", data_dir)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(methodcaller("entry", 2), made).result() == made.entry(2)
        there = pool.submit(methodcaller("decode", SpanRule(), None), made.open(2)).result()
    np.testing.assert_array_equal(there.frames, decoded(made, 2).frames)


def test_pictures_are_decoded_as_tfds_does(data_dir):
    made = source("grey_digits", data_dir, split="train")
    for index, example in enumerate(tfds.data_source("grey_digits", split="train", data_dir=data_dir, download=False)):
        np.testing.assert_array_equal(decoded(made, index).frames[0], np.repeat(example["image"], 3, axis=-1))
