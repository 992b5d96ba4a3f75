"""Tiles: they cover a clip, mix to what was cut, reach as far as gradients say, and are the whole where they can be."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_runs import chain, run  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.config import from_dict, to_dict
from sora_jax.data.latents import LatentCache
from sora_jax.errors import UserError
from sora_jax.generate.preview import held_out_psnr, reconstruction_preview
from sora_jax.models import tiling
from sora_jax.models.autoencoder import AutoencoderConfig, autoencoder_specs, decode, encode, receptive_field
from sora_jax.models.autoencoder_kl import KLConfig
from sora_jax.models.first_stage import autoencoder_specs as specs_of
from sora_jax.models.tiling import TilingConfig
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.train import frozen as frozen_autoencoder
from sora_jax.train.autoencoder import AutoencoderRun
from sora_jax.train.frozen import FrozenAutoencoder, measure_statistics
from sora_jax.train.state import MODEL

SMALL = dict(width=4, latent_channels=2, encoder_blocks=1, decoder_blocks=1, dtype="float32")
LEVELS = AutoencoderConfig(
    time_factor=2, space_factor=4, patch=(1, 2), multipliers=(1, 2), kernels=((2, 3, 3),), **SMALL
)
PATCH = AutoencoderConfig(time_factor=4, space_factor=4, patch=(4, 4), multipliers=(1,), kernels=((2, 3, 3),), **SMALL)
KL = KLConfig(latent_channels=2, widths=(4, 8), blocks=1, groups=2, dtype="float32")


@pytest.fixture(scope="module")
def made(randomised):
    """made(config): a frozen autoencoder with random weights."""

    @functools.cache
    def build(config):
        params = randomised(specs_of(config))
        return FrozenAutoencoder(config, params, np.float32([0.5, -1.0]), np.float32([2.0, 0.5]))

    return build


def clip(frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


@settings(max_examples=100, deadline=None)
@given(
    grid=st.tuples(*[st.integers(1, 20)] * 3),
    tile=st.tuples(st.integers(2, 7), st.integers(1, 9), st.integers(0, 9)),
    overlap=st.floats(0, 0.99),
    config=st.sampled_from([LEVELS, PATCH, KL]),
    margins=st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 4, float("inf")])),
)
def test_tiles_are_in_the_clip_of_one_shape_overlap_enough_and_join_to_what_was_cut(
    grid, tile, overlap, config, margins
):
    time, space, _ = tiling.factors(config)
    pixels = (1 + time * (tile[0] - 1), space * tile[1], space * tile[2])
    axes = tiling.lay_out(config, TilingConfig(pixels, overlap), grid)
    for axis, size, most in zip(axes, grid, tile, strict=True):
        assert axis.extent == (min(size, most) if most else size)
        assert axis.starts[0] == 0 and axis.starts[-1] + axis.extent == size
        steps = np.diff(axis.starts)
        assert (steps > 0).all() and (steps <= max(1, (1 - overlap) * axis.extent)).all()
    rng, receptive_fields = np.random.default_rng(0), ((margins[0], 0), *[(margins[1],) * 2] * 2)
    for factors in (tiling.LATENTS, tiling.factors(config)):
        t, h, w = (size * factor for size, factor in zip(grid, factors, strict=True))
        whole = rng.standard_normal((1 + t - factors[0], h, w, 2)).astype(np.float32)
        parts = tiling.cut(whole, axes, factors)
        assert len({part.shape for part in parts}) == 1 and len(parts) == tiling.count(axes)
        np.testing.assert_allclose(tiling.join(parts, axes, factors, receptive_fields), whole, atol=1e-5)


@pytest.mark.parametrize("config", [LEVELS, PATCH], ids=["levels", "patch"])
def test_the_receptive_field_is_where_gradients_end(config, randomised):
    """Of the middle of a clip: everything within reach is near it, and what is a latent beyond it is not."""
    params, (ft, fs, _) = randomised(autoencoder_specs(config)), tiling.factors(config)
    t, side, middle = 12, 15, 7
    video = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 1 + ft * (t - 1), fs * side, fs * side, 3)), "f4")
    z = jnp.asarray(np.random.default_rng(1).standard_normal((1, t, side, side, 2)), jnp.float32)
    place = slice(fs * middle, fs * (middle + 1))
    encoded = lambda v: encode(params, config, v)[0][0, -1, middle, middle].sum()  # noqa: E731
    decoded = lambda z: decode(params, config, z)[0, -ft:, place, place].sum()  # noqa: E731
    ways = {"encode": (video, encoded, ft, fs), "decode": (z, decoded, 1, 1)}
    for what, (x, function, per_time, per_space) in ways.items():
        slope = np.abs(jax.jit(jax.grad(function))(x)[0]).max(-1)
        frames, rows, columns = (np.flatnonzero(slope.max(axes)) for axes in ((1, 2), (0, 2), (0, 1)))
        back = x.shape[1] - per_time - frames[0]  # frames before those of the last latent
        sides = [middle * per_space - side[0] for side in (rows, columns)]
        sides += [side[-1] + 1 - (middle + 1) * per_space for side in (rows, columns)]
        assert receptive_field(config, what) == (-(-back // per_time) + 1, -(-max(sides) // per_space))


EXACT = {"levels": (LEVELS, (17, 64, 32), (11, 32, 0), 0.8), "patch": (PATCH, (33, 40, 44), (29, 32, 32), 0.85)}


@pytest.mark.parametrize("name", EXACT)
def test_tiles_that_overlap_enough_are_the_whole_and_others_are_near(made, name):
    config, size, tile, overlap = EXACT[name]
    autoencoder, latent = made(config), None
    for what in ("encode", "decode"):
        x = clip(*size) if what == "encode" else 0.3 * latent
        run = lambda tiles, x=x, what=what: next(getattr(autoencoder, what)([x], 4, tiles=tiles))  # noqa: E731
        whole = run(TilingConfig())
        latent, whole = whole, whole.astype(float)
        enough, little = (run(TilingConfig(tile, share)).astype(float) for share in (overlap, 0.2))
        tolerance = 1e-4 if what == "encode" else 1  # of uint8
        assert np.abs(enough - whole).max() <= tolerance < np.abs(little - whole).max()
        grid = tiling.latent_grid(config, *size)
        told = [tiling.tiling_warning(config, TilingConfig(tile, share), [grid], what) for share in (overlap, 0.2)]
        assert told[0] == "" and "exact from an overlap of 0." in told[1]
        least = float(told[1].split()[-1])
        exact = [
            tiling.tiling_warning(config, TilingConfig(tile, x), [grid], what) == "" for x in (least, least - 0.25)
        ]
        assert exact == [True, False]
        assert np.abs(little - whole).mean() < 0.2 * np.abs(whole - whole.mean()).mean()


def test_padded_clips_of_many_sizes_are_cut_as_they_are_alone(made):
    autoencoder = made(LEVELS)
    clips = [clip(5, 24, 16, 1), clip(13, 40, 16, 2), clip(3, 8, 8, 3), clip(13, 40, 16, 4)]
    tiles = TilingConfig((11, 32, 0), 0.8)
    alone = [next(autoencoder.encode([one])) for one in clips]
    together = autoencoder.encode(clips, 3, padded_shapes=[(13, 40, 16)], tiles=tiles)
    for one, other in zip(alone, together, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(other, one, atol=1e-4)
    decoded = list(autoencoder.decode(alone, 3, tiles=tiles))
    assert [x.shape for x in decoded] == [x.shape for x in clips]


def test_a_mesh_shares_out_tiles_and_their_rows(made):
    autoencoder, video = made(LEVELS), clip(9, 40, 24)
    tiles = TilingConfig((5, 24, 0), 0.5)
    wanted = next(autoencoder.encode([video], 4, tiles=tiles))
    with jax.set_mesh(make_mesh(MeshConfig(data=4, sequence=2))):
        found = next(autoencoder.encode([video], 4, tiles=tiles))
        decoded = next(autoencoder.decode([found], 4, tiles=tiles))
        with jax.transfer_guard_device_to_device("disallow"):  # the parameters are placed once, not with every batch
            again = list(autoencoder.encode([video] * 2, 4, tiles=tiles))
            assert len(again) == len(list(autoencoder.decode(again, 4, tiles))) == 2
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    alone = next(autoencoder.decode([found], 4, tiles=tiles))
    assert np.abs(decoded.astype(int) - alone).max() <= 1


def test_training_an_autoencoder_shows_and_measures_large_clips_in_tiles(made, tmp_path, monkeypatch):
    """What goes through it is never larger than a tile; tiles that overlap enough measure what the whole does."""
    autoencoder, clips = made(LEVELS), [clip(11, 40, 16, 1), clip(11, 40, 16, 2)]
    config = AutoencoderRun(model=LEVELS, tiles=TilingConfig((11, 32, 0), 0.8))
    encode_batch, sizes = frozen_autoencoder._encode, []
    wanted = [measure_statistics(autoencoder.params, LEVELS, clips, 2), held_out_psnr(autoencoder, clips)]
    with monkeypatch.context() as patch:
        watched = lambda *given: (sizes.append(given[2].shape[1:4]), encode_batch(*given))[1]  # noqa: E731
        patch.setattr(frozen_autoencoder, "_encode", watched)
        found = [measure_statistics(autoencoder.params, LEVELS, clips, 2, config.tiles)]
        found.append(held_out_psnr(autoencoder, clips, config.tiles))
        writer = types.SimpleNamespace(picture=lambda *_: None)
        reconstruction_preview(config, clips, tmp_path)(1, {MODEL: autoencoder.params}, writer)
    assert set(sizes) == {(11, 32, 16)} and (tmp_path / "samples" / "step_000001.png").exists()
    np.testing.assert_allclose(np.stack(found[0]), np.stack(wanted[0]), atol=1e-4)
    np.testing.assert_allclose(found[1], wanted[1], atol=0.05)
    older = {name: value for name, value in to_dict(AutoencoderRun(model=LEVELS)).items() if name != "tiles"}
    assert from_dict(AutoencoderRun, older) == AutoencoderRun(model=LEVELS)
    with pytest.raises(UserError, match="tile is .*; its height is 30"):
        AutoencoderRun(model=LEVELS, tiles=TilingConfig((0, 30, 0)))


def test_pictures_of_latent_diffusion_are_mixed(made):
    """Its norms see the whole picture, so tiles only resemble it; frames are apart, and cut exactly."""
    autoencoder, video = made(KL), clip(4, 16, 16)
    whole = next(autoencoder.encode([video]))
    frames = next(autoencoder.encode([video], tiles=TilingConfig((2, 0, 0), 0.0)))
    np.testing.assert_allclose(frames, whole, atol=1e-4)
    told = [
        tiling.tiling_warning(KL, TilingConfig(tile, 0.0), [(4, 8, 8)], "encode") for tile in ((2, 0, 0), (0, 8, 8))
    ]
    assert told == [
        "",
        "tiled results only approximate those of the whole clip; tiles of this size are exact at no overlap",
    ]
    tiled = next(autoencoder.encode([video], tiles=TilingConfig((0, 8, 8), 0.5)))
    assert 1e-3 < np.abs(tiled - whole).mean() < np.abs(whole).mean()


@pytest.mark.parametrize(
    "config, tile, message",
    [
        (LEVELS, (5, 30, 0), "tile is .*; its height is 30; .*28 or 32"),
        (LEVELS, (4, 32, 0), "tile is .*; its frames is 4; .*3 or 5"),
        (LEVELS, (1, 32, 0), "it must have more than . frames, as tiles of one cannot overlap"),
        (KL, (1, 3, 0), "height is 3"),
    ],
)
def test_tiles_that_the_autoencoder_cannot_take_are_refused(made, config, tile, message):
    with pytest.raises(UserError, match=message):
        next(made(config).encode([clip(5, 32, 32)], tiles=TilingConfig(tile)))


@pytest.mark.parametrize("text", ["17", "17x256", "ax2x3", "17x-1x2"])
def test_a_tile_on_the_command_line_is_three_numbers(text):
    assert TilingConfig.parse("17x256x0", 0.5) == TilingConfig((17, 256, 0), 0.5)
    with pytest.raises(UserError, match=f"--tile is {text!r}; it must be FRAMESxHEIGHTxWIDTH"):
        TilingConfig.parse(text)
    with pytest.raises(UserError, match="--tile-overlap is 1"):
        dataclasses.replace(TilingConfig(), overlap=1.0)


def test_encode_and_sample_take_tiles(chain, tmp_path, capsys):  # noqa: F811
    folders = [f"--autoencoder={chain.autoencoder}", f"--data={chain.dataset}", f"--out={tmp_path / 'latents'}"]
    assert run("data", "encode", *folders, "--tile=5x16x0", "--tile-overlap=0.5") == 0
    tiled, whole = LatentCache(tmp_path / "latents"), LatentCache(chain.latents)
    same = [np.allclose(tiled[i], whole[i], atol=4e-3) for i in range(len(whole))]
    assert all(tiled[i].shape == whole[i].shape for i in range(len(whole)))
    assert capsys.readouterr().err.count("tiled results only approximate those of the whole clip") == 1
    fits = [whole[i].shape[0] <= 2 and whole[i].shape[1] <= 4 for i in range(len(whole))]
    assert not all(same) and all(one for one, fit in zip(same, fits, strict=True) if fit)
    sample = ["sample", f"--workdir={chain.transformer}", "--prompt=a fox", "--steps=1", "--frames=9", "--height=16"]
    sample += ["--width=24", f"--out={tmp_path / 'fox.gif'}", "--tile=5x0x16"]
    assert run(*sample) == 0 and (tmp_path / "fox.gif").exists()
    assert run(*sample, "--tile=4x0x16") == 2 and "its frames is 4" in capsys.readouterr().err
    assert run(*sample, "--tile-overlap=1") == 2 and "--tile-overlap is 1" in capsys.readouterr().err
