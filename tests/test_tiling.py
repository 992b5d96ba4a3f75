"""Tiles and chunks: they cover a clip, join to what was cut, and are the whole wherever they can be."""

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
from sora_jax.data.storing.latents import LatentCache
from sora_jax.errors import UserError
from sora_jax.generate.preview import Reconstructions, held_out_psnr, reconstruction_preview
from sora_jax.models import tiling
from sora_jax.models.autoencoder import AutoencoderConfig, autoencoder_specs, decode, encode, receptive_field
from sora_jax.models.autoencoder_kl import KLConfig
from sora_jax.models.first_stage import autoencoder_specs as specs_of
from sora_jax.models.first_stage import block_of
from sora_jax.models.first_stage import decode as first_stage_decode
from sora_jax.models.tiling import TilingConfig
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.train import streaming
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
    tile=st.tuples(st.integers(1, 9), st.integers(0, 9)),
    overlap=st.floats(0, 0.99),
    factor=st.sampled_from([1, 4]),
    radius=st.sampled_from([0, 1, 4, float("inf")]),
)
def test_tiles_have_one_shape_cover_the_clip_and_join_to_what_was_cut(grid, tile, overlap, factor, radius):
    axes = tuple(tiling._place(size, most, radius, overlap) for size, most in zip(grid[1:], tile, strict=True))
    for axis, size, most in zip(axes, grid[1:], tile, strict=True):
        assert axis.extent == (most or size)
        assert axis.starts[0] == 0 and axis.starts[-1] + axis.extent == max(size, axis.extent)
        common = axis.extent - np.diff(axis.starts)
        least = 2 * radius if 2 * radius < axis.extent else overlap * axis.extent
        assert (common < axis.extent).all() and (common >= min(least, axis.extent - 1) - 1e-6).all()
    t, h, w = (size * factor for size in grid)
    whole = np.random.default_rng(0).standard_normal((t, h, w, 2)).astype(np.float32)
    parts, sizes = zip(*tiling.cut(whole, axes, factor), strict=True)
    assert len({part.shape for part in parts}) == 1 and len(parts) == tiling.count(axes)
    assert all(
        (part[:, rows:] == 0).all() and (part[:, :, columns:] == 0).all() for part, (rows, columns) in zip(parts, sizes)
    )
    np.testing.assert_allclose(tiling.join(parts, axes, factor, radius)[:, :h, :w], whole, atol=1e-5)


def test_a_position_is_taken_from_a_tile_that_sees_all_of_its_receptive_field():
    """Spoil what each tile has nearer to an inner edge than the radius: the result must not change."""
    size, radius, tile = 23, 2, 7
    axes = tiling._place(size, tile, radius, 0.0), tiling.Axis((0,), 1)
    whole = np.random.default_rng(0).standard_normal((1, size, 1, 1)).astype(np.float32)
    parts = [part.copy() for part, _ in tiling.cut(whole, axes)]
    for part in parts[1:]:
        part[:, :radius] = 1e9
    for part in parts[:-1]:
        part[:, -radius:] = 1e9
    assert len(parts) > 4
    np.testing.assert_array_equal(tiling.join(parts, axes, 1, radius), whole)


@pytest.mark.parametrize("config", [LEVELS, PATCH], ids=["levels", "patch"])
def test_the_receptive_field_is_where_gradients_end(config, randomised):
    """Of the middle of a clip: everything within reach is near it, and what is a latent beyond it is not."""
    params, (ft, fs, _) = randomised(autoencoder_specs(config)), block_of(config)
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


def relative(found, wanted):
    """The largest difference of arrays, over the largest value."""
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, wanted, strict=True))


CLIPS = [clip(17, 24, 16, 1), clip(1, 8, 8, 2), clip(9, 40, 24, 3), clip(13, 16, 40, 4)]
SHORTCUTS = AutoencoderConfig(
    time_factor=4, space_factor=4, patch=(2, 2), multipliers=(1, 2), kernels=((3, 3, 3),), shortcuts=True, linear=True,
    norm="frame", attention=True, decoder_width=8, **SMALL,
)  # fmt: skip
TWICE = AutoencoderConfig(
    time_factor=4, space_factor=4, patch=(1, 1), multipliers=(1, 1, 2), kernels=((1, 3, 3), (3, 1, 1)), shortcuts=True,
    **SMALL,
)  # fmt: skip


def decoded(autoencoder, raw):
    return np.asarray(first_stage_decode(autoencoder.params, autoencoder.config, raw[None]))[0]


@pytest.fixture(scope="module")
def whole(made):
    """Give latents, raw latents, and decoded clips before rounding, of CLIPS without chunks and tiles."""

    @functools.cache
    def results(config):
        autoencoder = made(config)
        latents = [next(autoencoder.encode([one])) for one in CLIPS]
        raw = [z * autoencoder.std_C + autoencoder.mean_C for z in latents]
        return latents, raw, [decoded(autoencoder, z) for z in raw]

    return results


@pytest.mark.parametrize("config", [LEVELS, PATCH, TWICE, SHORTCUTS, KL], ids=["levels", "patch", "twice", "all", "kl"])
@pytest.mark.parametrize("latents", [1, 2, 5])
def test_chunks_are_the_whole_and_share_one_program_with_clips_of_every_size(made, whole, config, latents):
    """Chunks of 1, 2 and 5 latents of clips of 1 to 17 frames, each padded to one tile that holds the largest."""
    autoencoder = made(config)
    encoded, raw, clips = whole(config)
    tiles = TilingConfig((1 + config.time_factor * (latents - 1), 40, 40))
    before = streaming._encode_chunk._cache_size(), streaming._decode_chunk._cache_size()
    assert relative(autoencoder.encode(CLIPS, 3, tiles=tiles), encoded) < 1e-5
    found = streaming.decode_stream(autoencoder.params, config, raw, tiles, 3)
    assert relative(found, clips) < 1e-5
    after = streaming._encode_chunk._cache_size(), streaming._decode_chunk._cache_size()
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]


@pytest.mark.parametrize("config, tile", [(LEVELS, 40), (TWICE, 52), (PATCH, 36)], ids=["levels", "twice", "patch"])
def test_tiles_that_see_the_receptive_field_are_the_whole(made, config, tile):
    autoencoder = made(config)
    video = clip(1 + config.time_factor, 96, 60)
    latent = next(autoencoder.encode([video]))
    grid, raw = latent.shape[:3], latent * autoencoder.std_C + autoencoder.mean_C
    warning = lambda side, overlap=0.0: tiling.tiling_warning(  # noqa: E731
        config, TilingConfig((1, side, side), overlap), [grid], "encode"
    )
    tiles = TilingConfig((1, tile, tile), 0.0)
    assert tiling.count(tiling.lay_out(config, tiles, grid, "encode")) > 2 and warning(tile) == ""
    assert relative(autoencoder.encode([video], 4, tiles=tiles), [latent]) < 1e-5
    found = streaming.decode_stream(autoencoder.params, config, [raw], tiles, 4)
    assert relative(found, [decoded(autoencoder, raw)]) < 1e-5
    least = int(warning(8, 0.25).split("at least ")[1].split()[0])
    assert warning(least) == "" != warning(least - 4)
    near = next(autoencoder.encode([video], 4, tiles=TilingConfig((1, tile // 8 * 4, tile // 8 * 4), 0.5)))
    assert 1e-5 < relative([near], [latent]) and np.abs(near - latent).mean() < 0.5 * np.abs(latent).mean()


@pytest.mark.parametrize("config", [LEVELS, PATCH], ids=["levels", "patch"])
def test_a_rotated_ring_decodes_to_the_rotated_loop(made, config):
    autoencoder = made(config)
    z = np.random.default_rng(0).standard_normal((5, 4, 3, 2)).astype(np.float32)
    loop = autoencoder.decode_ring(z)
    assert loop.shape == (5 * config.time_factor, 16, 12, 3)
    for k in (1, 3):
        rotated = autoencoder.decode_ring(np.roll(z, k, axis=0))
        np.testing.assert_array_equal(rotated, np.roll(loop, k * config.time_factor, axis=0))
    plain = next(autoencoder.decode([z]))
    assert np.abs(loop[0].astype(int) - plain[0]).max() > 1  # the beginning of a ring knows its end


def test_a_long_latent_is_decoded_part_by_part(made):
    autoencoder = made(LEVELS)
    z = np.random.default_rng(0).standard_normal((7, 3, 4, 2)).astype(np.float32)
    parts = list(autoencoder.decode_chunks(z, TilingConfig((5, 0, 0))))  # 3 latents
    assert [len(part) for part in parts] == [5, 6, 2]
    assert np.abs(np.concatenate(parts).astype(int) - next(autoencoder.decode([z]))).max() <= 1


def test_one_tile_is_chosen_for_clips_of_many_sizes(made):
    """It takes all clips by one program, with less work than tiles of the largest clip's size."""
    sizes = {(1 + 2 * t, 8 * h, 8 * w): 1 + t for t in range(4) for h in range(1, 4) for w in range(1, 8)}
    chosen = tiling.choose_tile(PATCH, {(1 + 4 * (frames // 2), h, w): n for (frames, h, w), n in sizes.items()})
    assert tiling.tiling_warning(PATCH, chosen, [(1, 6, 14)], "encode") == ""
    clips = [clip(1 + 4 * (frames // 2), h, w) for frames, h, w in list(sizes)[::7]]
    before = streaming._encode_chunk._cache_size()
    found = list(made(PATCH).encode(clips, 4, tiles=chosen))
    assert streaming._encode_chunk._cache_size() - before == 1
    assert relative(found, [next(made(PATCH).encode([one])) for one in clips]) < 1e-5
    assert tiling.choose_tile(KL, {(1, 8, 12): 1, (3, 16, 4): 2}).tile[1:] == (16, 12)  # it sees whole frames


def test_a_mesh_shares_out_tiles_and_their_rows(made):
    autoencoder, video = made(LEVELS), clip(9, 40, 24)
    tiles = TilingConfig((5, 24, 0), 0.5)
    wanted = next(autoencoder.encode([video], 4, tiles=tiles))
    with jax.set_mesh(make_mesh(MeshConfig(data=4, sequence=2))):
        found = next(autoencoder.encode([video], 4, tiles=tiles))
        decoded = next(autoencoder.decode([found], 4, tiles=tiles))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    alone = next(autoencoder.decode([found], 4, tiles=tiles))
    assert np.abs(decoded.astype(int) - alone).max() <= 1


def test_training_an_autoencoder_shows_and_measures_large_clips_in_tiles(made, tmp_path, monkeypatch):
    """Watch what goes through it: never more than a tile, and the measurements are those of the whole."""
    autoencoder, clips = made(LEVELS), [clip(11, 40, 16, 1), clip(11, 40, 16, 2)]
    config = AutoencoderRun(model=LEVELS, tiles=TilingConfig((5, 36, 0), 0.8))
    encode_chunk, sizes = streaming._encode_chunk, []
    wanted = [measure_statistics(autoencoder.params, LEVELS, clips, 2), held_out_psnr(autoencoder, clips)]
    watched = lambda *given: (sizes.append(given[2].shape[1:4]), encode_chunk(*given))[1]  # noqa: E731
    watched.eval_shape = encode_chunk.eval_shape
    monkeypatch.setattr(streaming, "_encode_chunk", watched)
    found = [measure_statistics(autoencoder.params, LEVELS, clips, 2, config.tiles)]
    found.append(held_out_psnr(autoencoder, clips, config.tiles))
    writer = types.SimpleNamespace(picture=lambda *_: None)
    reconstruction_preview(Reconstructions(config, clips), ["a"] * len(clips), tmp_path)(
        1, {MODEL: autoencoder.params}, writer
    )
    assert set(sizes) == {(6, 36, 16)} and (tmp_path / "samples" / "step_000001.png").exists()
    np.testing.assert_allclose(np.stack(found[0]), np.stack(wanted[0]), atol=1e-4)
    np.testing.assert_allclose(found[1], wanted[1], atol=0.05)
    older = {name: value for name, value in to_dict(AutoencoderRun(model=LEVELS)).items() if name != "tiles"}
    assert from_dict(AutoencoderRun, older) == AutoencoderRun(model=LEVELS)
    with pytest.raises(UserError, match="tile is .*; its height is 30"):
        AutoencoderRun(model=LEVELS, tiles=TilingConfig((0, 30, 0)))


def test_pictures_of_latent_diffusion_are_mixed(made):
    """Its norms see the whole picture, so tiles only resemble it."""
    autoencoder, video = made(KL), clip(4, 16, 16)
    whole = next(autoencoder.encode([video]))
    told = [tiling.tiling_warning(KL, TilingConfig(tile), [(4, 8, 8)], "encode") for tile in ((2, 0, 0), (0, 8, 8))]
    assert told[0] == "" and told[1].endswith("this autoencoder has layers that see whole frames")
    tiled = next(autoencoder.encode([video], tiles=TilingConfig((0, 8, 8), 0.5)))
    assert 1e-3 < np.abs(tiled - whole).mean() < np.abs(whole).mean()


@pytest.mark.parametrize(
    "config, tile, message",
    [
        (LEVELS, (5, 30, 0), "tile is .*; its height is 30; .*28 or 32"),
        (LEVELS, (4, 32, 0), "tile is .*; its frames is 4; .*3 or 5"),
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
    assert run("data", "encode", *folders[:2], f"--out={tmp_path / 'one'}", "--tile=auto") == 0
    one = LatentCache(tmp_path / "one")
    assert all(np.allclose(one[i], whole[i], atol=4e-3) for i in range(len(whole))) and one.info == whole.info
    sample = ["sample", f"--workdir={chain.transformer}", "--prompt=a fox", "--steps=1", "--frames=9", "--height=16"]
    sample += ["--width=24", f"--out={tmp_path / 'fox.gif'}", "--tile=5x0x16"]
    assert run(*sample) == 0 and (tmp_path / "fox.gif").exists()
    assert run(*sample, "--tile=4x0x16") == 2 and "its frames is 4" in capsys.readouterr().err
    assert run(*sample, "--tile-overlap=1") == 2 and "--tile-overlap is 1" in capsys.readouterr().err
