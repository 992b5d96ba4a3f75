"""Moving MNIST: purity, protocol of motion, digits as they are, splits by image, captions, files of all kinds."""

import gzip
import sys
from dataclasses import replace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from fixtures_digits import drawn_digits, write_idx
from PIL import Image

from sora_jax.cli import main
from sora_jax.data.storing.drawn import DrawnClips, DrawnConfig
from sora_jax.data.storing.manifest import Dataset
from sora_jax.errors import UserError
from sora_jax.worlds import HELD_OUT
from sora_jax.worlds.digits import load_digits, read_idx
from sora_jax.worlds.moving_mnist import (
    FASTEST,
    STEP,
    MovingMnistConfig,
    captions_of,
    count_of,
    draw,
    plan,
    size_of,
)
from sora_jax.worlds.table import NAMED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with 40 test digits, as MNIST's files have them."""
    made = tmp_path_factory.mktemp("digits")
    images, labels = drawn_digits(40)
    write_idx(made / "t10k-images-idx3-ubyte.gz", images)
    write_idx(made / "t10k-labels-idx1-ubyte.gz", labels)
    return made


@pytest.fixture
def config(folder):
    return MovingMnistConfig(digits_path=str(folder))


def test_a_clip_is_a_pure_function_of_config_and_index(config):
    forward = [draw(config, i) for i in range(6)]
    backward = [draw(replace(config), i) for i in reversed(range(6))][::-1]
    for clip, again in zip(forward, backward, strict=True):
        np.testing.assert_array_equal(clip, again)
    assert len({clip.tobytes() for clip in forward} | {draw(replace(config, seed=1), 0).tobytes()}) == 7


@pytest.mark.parametrize("options", [{}, {"size": 40, "frames": 5, "digits": 3}, {"stochastic": True}])
def test_sizes_are_known_without_digits(config, options):
    config = replace(config, **options)
    clip = draw(config, 3)
    assert size_of(replace(config, digits_path="nowhere"), 3) == clip.shape[:3]
    assert clip.dtype == np.uint8 and (clip == clip[..., :1]).all()
    assert count_of(config) is None


def test_one_digit_shows_its_image_where_the_plan_says(config):
    config = replace(config, digits=1)
    images = load_digits(config.digits_path, config.held_out_digits)["train"].images
    for index in range(5):
        clip, planned = draw(config, index)[..., 0], plan(config, index)
        for frame, (top, left) in zip(clip, planned.places_NT2[0], strict=True):
            part = frame[top : top + 28, left : left + 28]
            np.testing.assert_array_equal(part, images[planned.numbers_N[0]])
            assert frame.sum(dtype=int) == part.sum(dtype=int)


def test_digits_reflect_at_the_borders(config):
    """The free way, unfolded at its borders, is a straight line passed at constant speed."""
    config, free = replace(config, digits=1, frames=40, size=1028), 1000
    slopes = []
    for index in range(20):
        places_T2 = plan(config, index).places_NT2[0].astype(float)
        assert places_T2.min() >= 0 and places_T2.max() <= free
        steps = np.abs(np.diff(places_T2, axis=0))
        inside = ((places_T2 > 0) & (places_T2 < free))[1:] & ((places_T2 > 0) & (places_T2 < free))[:-1]
        speed = np.array([np.median(steps[inside[:, axis], axis]) for axis in (0, 1)])
        np.testing.assert_allclose(np.hypot(*speed), STEP * free, atol=2)
        for axis in (0, 1):  # between two borders a step is never longer, and only shorter where a border stops it
            assert steps[:, axis].max() <= speed[axis] + 1.5
            np.testing.assert_allclose(steps[inside[:, axis], axis], speed[axis], atol=1.5)
        slopes.append(np.sign(np.diff(places_T2[:2, 0]))[0])
    assert set(slopes) == {-1.0, 1.0}
    touched = [np.isin(plan(config, index).places_NT2, (0, free)).any() for index in range(20)]
    assert all(touched)  # a border is reached exactly


def test_stochastic_digits_turn_at_borders_alone_and_leave_them_inwards(config):
    config = replace(config, digits=1, stochastic=True, digit_size=32, frames=200)
    velocities, free = set(), config.size - config.digit_size
    for index in range(10):
        places_T2 = plan(config, index).places_NT2[0]
        steps, at_border = np.diff(places_T2, axis=0), np.isin(places_T2, (0, free - 1))
        assert places_T2.min() == 0 and places_T2.max() == free - 1
        assert np.abs(steps).max() == FASTEST
        inside = ~at_border.any(1)
        straight = inside[:-2] & inside[1:-1] & inside[2:]
        np.testing.assert_array_equal(steps[:-1][straight], steps[1:][straight])
        inwards = np.where(places_T2[:-1] == 0, steps, -steps)
        assert inwards[at_border[:-1]].min() >= 0
        velocities |= set(map(tuple, steps[:-1][straight].tolist()))
    assert len(velocities) > 40  # of 81 - 9


def test_overlaps_show_the_maximum_or_the_sum(config):
    for stochastic in (False, True):
        own = replace(config, stochastic=stochastic, digits=3, size=32)
        images = load_digits(own.digits_path, own.held_out_digits)["train"].images
        planned = plan(own, 1)
        layers = np.zeros((3, own.frames, 32, 32), int)
        for layer, number, places in zip(layers, planned.numbers_N, planned.places_NT2, strict=True):
            for frame, (top, left) in zip(layer, places, strict=True):
                frame[top : top + 28, left : left + 28] = images[number]
        wanted = np.minimum(layers.sum(0), 255) if stochastic else layers.max(0)
        np.testing.assert_array_equal(draw(own, 1)[..., 0], wanted)


def test_held_out_clips_show_held_out_digits_alone(config, folder):
    parts = load_digits(str(folder), 0.2)
    train, held_out = ({image.tobytes() for image in parts[name].images} for name in ("train", "held-out"))
    assert (len(train), len(held_out)) == (32, 8) and not train & held_out
    images, _ = drawn_digits(40)
    kept = [number for number, image in enumerate(images) if image.tobytes() in held_out]
    assert set(np.diff(kept)) == {5}  # spread evenly
    one = replace(config, digits=1)
    for start, allowed in ((0, train), (HELD_OUT, held_out)):
        for index in range(start, start + 20):
            top, left = plan(one, index).places_NT2[0, 0]
            assert draw(one, index)[0, top : top + 28, left : left + 28, 0].tobytes() in allowed


def test_training_and_test_files_are_the_two_splits(tmp_path):
    images, labels = drawn_digits(12)
    write_idx(tmp_path / "train-images-idx3-ubyte", images[:9])
    write_idx(tmp_path / "t10k-images.idx3-ubyte.gz", images[9:])
    parts = load_digits(str(tmp_path), 0.5)
    np.testing.assert_array_equal(parts["train"].images, images[:9])
    np.testing.assert_array_equal(parts["held-out"].images, images[9:])
    assert parts["train"].labels is None  # no file has them
    config = MovingMnistConfig(digits_path=str(tmp_path))
    assert captions_of(config, 0) == {"original": "a digit and a digit move"}


def test_captions_name_the_digits(config):
    found = {captions_of(config, index)["original"] for index in range(300)}
    assert "a three and an eight move" in found and len(found) > 60
    assert all(caption.startswith("a") and caption.endswith(" move") for caption in found)
    (one,) = captions_of(replace(config, digits=1), 0).values()
    assert one.endswith(" moves") and " and " not in one
    labels = load_digits(config.digits_path, config.held_out_digits)["train"].labels
    words = "zero one two three four five six seven eight nine".split()
    assert one.split()[1] == words[labels[plan(replace(config, digits=1), 0).numbers_N[0]]]


def test_scaling_keeps_constants_and_slopes(config):
    digits = load_digits(config.digits_path, config.held_out_digits)["train"]
    assert digits.scaled(28) is digits.images
    flat = replace(digits, images=np.full((1, 28, 28), 77, np.uint8))
    np.testing.assert_array_equal(flat.scaled(32), np.full((1, 32, 32), 77))
    ramp = replace(digits, images=np.broadcast_to(8 * np.arange(28, dtype=np.uint8), (1, 28, 28)))
    wanted = 8 * ((np.arange(32) + 0.5) * 28 / 32 - 0.5)
    np.testing.assert_allclose(ramp.scaled(32)[0, 5, 1:-1], wanted[1:-1], atol=0.5)


def test_idx_files_are_read_as_written(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (3, 4, 5), np.uint8)
    write_idx(tmp_path / "a", values)
    write_idx(tmp_path / "b.gz", values)
    assert gzip.decompress((tmp_path / "b.gz").read_bytes()) == (tmp_path / "a").read_bytes()
    for name in ("a", "b.gz"):
        np.testing.assert_array_equal(read_idx(tmp_path / name), values)


class Mnist(tfds.core.GeneratorBasedBuilder):
    """Three training digits and two test digits, prepared by TFDS."""

    VERSION = tfds.core.Version("3.0.1")
    skip_registration = True

    def _info(self):
        image, label = tfds.features.Image(shape=(28, 28, 1)), tfds.features.ClassLabel(num_classes=10)
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        return {"train": self._generate_examples(range(3)), "test": self._generate_examples(range(3, 5))}

    def _generate_examples(self, numbers):
        images, labels = drawn_digits(5)
        for n in numbers:
            yield n, {"image": Image.fromarray(images[n]), "label": int(labels[n])}


def test_digits_of_tfds(tmp_path, monkeypatch):
    Mnist(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    images, labels = drawn_digits(5)
    parts = load_digits("tfds:mnist", 0.5)
    for name, numbers in (("train", range(3)), ("held-out", range(3, 5))):
        wanted = {(images[n].tobytes(), labels[n]) for n in numbers}
        assert {(image.tobytes(), label) for image, label in zip(parts[name].images, parts[name].labels)} == wanted
    assert "tensorflow" not in sys.modules


def test_a_dataset_is_built_of_it(folder, tmp_path):
    """The clips, captions and splits of a dataset folder are those of the world."""
    options = ["--source=world", "--limit=5", "--holdout=0.4", "--max-frames=20", "--time-factor=1", "--multiple=8"]
    for name in ("moving_mnist", "moving_mnist:stochastic"):
        out = tmp_path / name
        assert (
            main(["data", "build", *options, f"--world={name}", f"--digits={folder}", f"--out={out}", "--quiet"]) == 0
        )
        dataset, config = Dataset(out), replace(NAMED[name], digits_path=str(folder))
        found = {(clip.frames.tobytes(), clip.caption) for clip in map(dataset.__getitem__, range(5))}
        indices = [0, 1, 2, HELD_OUT, HELD_OUT + 1]
        assert found == {(draw(config, i).tobytes(), captions_of(config, i)["original"]) for i in indices}
        assert dataset.indices("held-out").size == 2


def test_digits_are_asked_for(folder, tmp_path, capsys):
    build = ["data", "build", "--source=world", "--limit=5", f"--out={tmp_path / 'x'}"]
    for options, message in (
        (
            ["--world=moving_mnist"],
            "--digits is not given; with --world=moving_mnist it must be a folder with idx files",
        ),
        (["--world=full", f"--digits={folder}"], "with --world=full it must be left out"),
        (["--world=moving_mnist", "--digits=nowhere"], "world.digits_path is 'nowhere'; it must be a folder with idx"),
    ):
        assert main([*build, *options]) == 2
        assert message in capsys.readouterr().err


def test_clips_are_drawn_for_training(config):
    clips = DrawnClips(DrawnConfig(config, clips=3, held_out=2, grey=True), "x")
    np.testing.assert_allclose(clips[4], draw(config, HELD_OUT + 1)[..., :1] / 127.5 - 1, atol=1e-6)
    assert clips.splits == {"train": 3, "held-out": 2} and clips.grids.tolist() == [[20, 64, 64]] * 5
    moved = replace(config, digits_path="elsewhere")
    assert DrawnClips(DrawnConfig(moved, clips=3, held_out=2, grey=True), "x").digest == clips.digest


def test_mistakes_are_told(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    (tmp_path / "text").write_text("no digits")
    (tmp_path / "empty").mkdir()
    write_idx(tmp_path / "cut", drawn_digits(3)[0])
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-5])
    for name in ("", str(tmp_path / "none"), str(tmp_path / "text"), str(tmp_path / "empty"), str(tmp_path / "cut")):
        with pytest.raises(UserError, match=r"^world.digits_path is .*; it must be a folder with idx files of MNIST"):
            draw(MovingMnistConfig(digits_path=name), 0)
    with pytest.raises(UserError, match=r"world.digits_path is 'tfds:mnist'; it must be"):
        load_digits("tfds:mnist", 0.2)
    with pytest.raises(UserError, match=r"world.held_out_digits is 0.001; of 40 digits it must leave some"):
        load_digits(str(folder), 0.001)
    for options, message in (
        ({"size": 28}, "world.size is 28; it must be greater than digit_size, 28"),
        ({"digits": 0}, "world.digits is 0; it must be at least 1"),
        ({"held_out_digits": 1.0}, "world.held_out_digits is 1.0; it must be between 0 and 1"),
        ({"frames": 0}, "world.frames is 0; it must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            MovingMnistConfig(**options)
