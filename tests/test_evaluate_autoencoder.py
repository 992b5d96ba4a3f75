"""`sora-jax evaluate --autoencoder`: linear autoencoders, of which all measurements are known."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from fixtures_datasets import write_dataset
from PIL import Image

from sora_jax.data.reading.media import decode
from sora_jax.data.storing.clips import Clip
from sora_jax.data.storing.manifest import Dataset, add_clip
from sora_jax.errors import UserError
from sora_jax.evaluate.autoencoder import EvaluateOptions, evaluate_autoencoder
from sora_jax.evaluate.autoencoder_report import Report
from sora_jax.generate.preview import held_out_psnr
from sora_jax.models.autoencoder import AutoencoderConfig, autoencoder_specs, start_from_linear
from sora_jax.models.tiling import TilingConfig
from sora_jax.nn.params import init
from sora_jax.train.frozen import FrozenAutoencoder, load_autoencoder, save_autoencoder
from sora_jax.train.linear_codec import fit_linear_codec

SIZES = [(5, 16, 16), (5, 16, 16), (1, 16, 16), (1, 8, 16)]
MEAN, STD = 0.3, 2.0  # of the latents, as they are normalised


def clip_of(seed: int, size: tuple[int, int, int]) -> np.ndarray:
    """Make noise with little detail along columns, far from black and white, whose upper half is still."""
    rng, (T, H, W) = np.random.default_rng(seed), size
    coarse = rng.uniform(90, 160, (T, H // 4, W, 3)).repeat(4, axis=1)
    clip = (coarse + rng.uniform(-15, 15, (T, H, W, 3))).astype(np.uint8)
    clip[:, : H // 2] = clip[0, : H // 2]
    return clip


def write(folder: Path, split: str) -> Path:
    """Write a dataset with as many clips of the split "train" as of another."""
    with write_dataset(folder, {}) as writer:
        for number, size in enumerate(2 * SIZES):
            own = split if number >= len(SIZES) else "train"
            add_clip(writer, Clip(str(number), clip_of(number, size), 8.0), str(number), own)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "clips", "test")


def small(factor: int, channels: int, **others) -> AutoencoderConfig:
    """Return the config of an autoencoder that compresses by factor^3."""
    return AutoencoderConfig(
        time_factor=factor, space_factor=factor, latent_channels=channels, patch=(factor, factor), width=4,
        multipliers=(1,), encoder_blocks=1, decoder_blocks=1, l2_weight=4.0, kl_weight=1e-3, dtype="float32", **others,
    )  # fmt: skip


def save(folder: Path, config: AutoencoderConfig, params: dict) -> Path:
    statistics = (np.full(config.latent_channels, value, np.float32) for value in (MEAN, STD))
    save_autoencoder(FrozenAutoencoder(config, params, *statistics), folder / "frozen", {})
    return folder


def make_run(folder: Path, data: Path, factor: int, channels: int, blank: bool = False) -> Path:
    """Write an autoencoder that is a linear codec of the dataset's training clips; blank: it decodes to grey."""
    config = small(factor, channels, kernels=((1, 1, 1),), linear=True)
    dataset = Dataset(data)
    clips = [dataset[row["index"]].frames for row in dataset.rows("train")]
    codec = fit_linear_codec(clips, config.block, channels)
    params = init(autoencoder_specs(config), jax.random.key(0))
    params = start_from_linear(params, codec.components_PC, codec.mean_P, codec.std_C)
    if blank:
        params["decoder"]["linear"] = jax.tree.map(np.zeros_like, params["decoder"]["linear"])
    return save(folder, config, params)


@pytest.fixture(scope="module")
def linear(tmp_path_factory, data) -> Path:
    """Return a run whose autoencoder is the linear bound: 2 x 2 x 2 with 6 channels."""
    return make_run(tmp_path_factory.mktemp("linear"), data, 2, 6)


@pytest.fixture(scope="module")
def report(linear, data) -> Report:
    return evaluate_autoencoder(linear, data)


def test_a_linear_codec_measures_what_the_linear_bound_does(report):
    own, bound = dataclasses.asdict(report.quality), dataclasses.asdict(report.bound)
    assert own == pytest.approx(bound, rel=2e-3) and 20 < own["psnr"] < 50
    assert list(report.by_size) == list(report.bound_by_size) == ["5x16x16", "1x8x16", "1x16x16"]
    assert not report.notes


def test_held_out_clips_are_measured_as_in_training(report, linear, data):
    dataset = Dataset(data)
    clips = [dataset[row["index"]].frames for row in dataset.held_out()]
    assert report.quality.psnr == pytest.approx(held_out_psnr(load_autoencoder(linear), clips), abs=1e-6)
    assert (report.split, report.clips, report.available) == ("held-out", 4, 4)


def test_sizes_and_rates(report):
    assert (report.block, report.channels, report.compression) == ((2, 2, 2), 6, 4.0)
    values = 6 * (2 * 3 * 8 * 8 + 8 * 8 + 4 * 8)  # of the latents of SIZES
    assert report.rate == pytest.approx(values / (2 * 5 * 16 * 16 + 16 * 16 + 8 * 16))
    assert report.loss_resolution_l2 == pytest.approx(10 * math.log10(4 / (1e-3 * 4 / (2 * 4))))
    assert set(report.parameters) == {"encoder", "decoder"}
    blocks = 4 * 4 + 4 + 4  # of width 4: a convolution and a norm
    assert report.parameters["decoder"] == (6 * 4 + 4) + blocks + 4 + (4 * 24 + 24) + (6 * 24 + 24)


def test_latents_of_a_linear_codec(report):
    assert report.latents.dead == []
    np.testing.assert_allclose(report.latents.std, 1, atol=0.4)  # it was fitted to other, few clips
    np.testing.assert_allclose(report.latents.posterior_std, math.exp(-2.5), rtol=1e-5)
    assert report.spectrum.block == 4  # the smallest latent has 4 rows
    assert sum(report.spectrum.latents) == pytest.approx(1) == sum(report.spectrum.images)


def test_the_report_is_json_and_a_table(report, linear, capsys):
    saved = json.loads((linear / "evaluation" / "report.json").read_text())
    assert saved == json.loads(json.dumps(dataclasses.asdict(report), allow_nan=False))
    lines = report.text.splitlines()
    row = next(line.split() for line in lines if line.startswith("all"))
    assert row[:3] == ["all", "4", f"{report.quality.psnr:.2f}"] and row[-1] == f"{report.bound.psnr:.2f}"
    many = {f"{frames}x8x8": report.quality for frames in range(12)} | {"others": report.quality}
    longest = dataclasses.replace(report, by_size=many, bound_by_size=many, notes=["one", "two"])
    assert len(longest.text.splitlines()) <= 40 and max(map(len, lines[:-1])) <= 120


def test_pictures_show_clips_and_reconstructions(report, linear, data):
    assert [Path(file).name for file in report.files] == ["comparison.png", "comparison.mp4", "report.json"]
    sheet = np.asarray(Image.open(linear / "evaluation" / "comparison.png"))
    still = clip_of(7, (1, 8, 16))[0].repeat(10, axis=0).repeat(10, axis=1)  # enlarged to 80 pixels, in the third cell
    places = np.lib.stride_tricks.sliding_window_view(sheet[:, :, 0], still.shape[:2])[::1, ::1]
    assert (places[:, :, ::10, ::10] == still[::10, ::10, 0]).all((2, 3)).any()
    video = decode(linear / "evaluation" / "comparison.mp4")
    assert len(video.frames) == 5 and video.fps == 8
    assert video.frames.shape[1] >= 80 and video.frames.shape[2] >= 160


@pytest.fixture(scope="module")
def pointwise(tmp_path_factory, data) -> Report:
    """Return the report of an autoencoder that changes colours alone, and loses nothing."""
    return evaluate_autoencoder(make_run(tmp_path_factory.mktemp("pointwise"), data, 1, 3), data)


def test_a_pointwise_autoencoder_commutes_with_everything(pointwise):
    assert pointwise.quality.psnr == pointwise.bound.psnr == 100 and pointwise.quality.flicker == 0
    robust = pointwise.robustness
    assert robust.rotated == robust.seams == 100 and robust.half_size > 55  # some pixels lie between two levels
    assert "tiles of half the side against whole clips: exact" in pointwise.text


def test_noise_on_latents_becomes_noise_of_known_size_on_pixels(pointwise, data):
    dataset = Dataset(data)
    pixels = [dataset[row["index"]].frames.reshape(-1, 3) / 127.5 - 1 for row in dataset.rows("train")]
    error = (0.1 * STD) ** 2 * np.concatenate(pixels).var(0).mean()
    assert pointwise.quality.psnr + pointwise.robustness.noise_change == pytest.approx(
        10 * math.log10(4 / error), abs=0.3
    )


def test_seams_and_rotations_show_where_blocks_have_sides(report):
    assert report.robustness.seams == 100  # blocks are separate: tiles are exact
    assert report.robustness.rotated < report.quality.psnr - 3  # and not symmetric
    assert report.robustness.half_size < 50


def test_seams_of_a_decoder_that_sees_farther_than_a_tile(data, tmp_path):
    config = small(2, 3, kernels=((1, 5, 5),))
    run = save(tmp_path, config, init(autoencoder_specs(config), jax.random.key(0)))
    found = evaluate_autoencoder(run, data, EvaluateOptions(clips=1))
    assert 10 < found.robustness.seams < 60 and f"whole clips: {found.robustness.seams:.1f} dB" in found.text


def test_tiles_change_nothing_where_blocks_are_separate(report, linear, data, tmp_path):
    options = EvaluateOptions(tiles=TilingConfig((3, 8, 8)), batch=2, out=tmp_path)
    cut = evaluate_autoencoder(linear, data, options)
    assert cut.quality.psnr == pytest.approx(report.quality.psnr, abs=0.01)
    assert cut.robustness.seams == 100 and (tmp_path / "report.json").exists()


def test_other_options(report, linear, data, tmp_path):
    few = evaluate_autoencoder(linear, data, EvaluateOptions(clips=2, seed=1, out=tmp_path))
    assert (few.clips, few.available) == (2, 4)
    assert few.robustness.noise_change != report.robustness.noise_change
    for name in ("clips", "batch"):
        with pytest.raises(UserError, match=f"--{name} is 0; it must be positive"):
            EvaluateOptions(**{name: 0})
    with pytest.raises(UserError, match="--tile is .* height is 9; it must be a positive multiple of 2"):
        evaluate_autoencoder(linear, data, EvaluateOptions(tiles=TilingConfig((0, 9, 8)), out=tmp_path))


def test_training_clips_are_measured_where_none_are_held_out(linear, tmp_path, capsys):
    found = evaluate_autoencoder(linear, write(tmp_path / "data", "train"), EvaluateOptions(out=tmp_path / "out"))
    assert found.split == "train" and found.available == 8
    assert "holds out no clip" in found.text
    assert "evaluate: 100%" in capsys.readouterr().err


def test_the_split_is_that_of_the_run(data, tmp_path):
    run = make_run(tmp_path, data, 2, 6)
    (run / "config.json").write_text(json.dumps({"split": "test"}))
    dataset = Dataset(data)
    found = evaluate_autoencoder(run, data)
    clips = [dataset[row["index"]].frames for row in dataset.rows("train")]
    assert found.quality.psnr == pytest.approx(held_out_psnr(load_autoencoder(run), clips), abs=1e-6)


def test_an_autoencoder_below_the_linear_bound_is_reported(data, tmp_path):
    found = evaluate_autoencoder(make_run(tmp_path, data, 2, 6, blank=True), data)
    assert found.quality.psnr < found.bound.psnr and "below the linear bound" in found.text


def test_a_dataset_that_does_not_fit_is_one_sentence(linear, tmp_path):
    with write_dataset(tmp_path / "data", {}) as writer:
        add_clip(writer, Clip("a", clip_of(0, (4, 16, 16)), 8.0), "a", "test")
    with pytest.raises(UserError, match=r"^[^\n]* clips of 4 x 16 x 16 [^\n]*frames is 4; it must be 1 \+ a multiple"):
        evaluate_autoencoder(linear, tmp_path / "data")


def test_without_training_clips_there_is_no_linear_bound(linear, tmp_path):
    with write_dataset(tmp_path / "data", {}) as writer:
        add_clip(writer, Clip("a", clip_of(0, (1, 4, 4)), 8.0), "a", "test")
    found = evaluate_autoencoder(linear, tmp_path / "data", EvaluateOptions(out=tmp_path / "out"))
    assert found.bound is None and "no linear bound: the dataset has no training clip" in found.text
    assert found.robustness.seams is None and "smaller than two tiles" in found.text
    assert [Path(file).name for file in found.files] == ["comparison.png", "report.json"]  # no clip moves
