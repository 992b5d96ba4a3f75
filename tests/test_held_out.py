"""The loss of held-out clips: which clips, at which noise, and that nothing but the weights changes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_caches import clip_row, write_cache
from test_copies import BYTES, config_of, params  # noqa: F401

from sora_jax.data.packing.packs import PackingConfig, PackItem, pack_batch, patchify
from sora_jax.errors import UserError
from sora_jax.kinds import run_config, stored_config
from sora_jax.kinds.denoiser import DENOISER
from sora_jax.models.denoiser import denoise
from sora_jax.nn.pack import Pack
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.train.held_out import HeldOut, HeldOutClips
from sora_jax.train.state import MODEL

GRIDS = [(1, 4, 4), (3, 4, 4), (1, 4, 4), (1, 2, 4), (5, 4, 4), (3, 4, 4), (1, 4, 4)]
ODD, LONG = (1, 3, 4), (9, 4, 4)  # not a number of patches; over the length of a pack
TEST_ONLY = clip_row(1, (1, 4, 4), split="test")
CONFIG = dataclasses.replace(config_of("packing.length=24"), batch=8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Five clips to train on, seven held out, and two that training could not take."""
    rows = [clip_row(n, (1, 4, 4)) for n in range(5)]
    rows += [clip_row(10 + n, grid, split=("held-out", "test")[n % 2]) for n, grid in enumerate(GRIDS)]
    rows += [clip_row(20 + n, grid, split="held-out") for n, grid in enumerate((ODD, LONG))]
    return write_cache(tmp_path_factory.mktemp("held_out") / "cache", rows)


def measure(cache, params, config=CONFIG, devices=1, mesh=MeshConfig()):  # noqa: F811
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:devices])):
        held_out = HeldOut(config, HeldOutClips(config, cache, BYTES))
        return held_out, held_out.losses(params), held_out(params)


@pytest.fixture(scope="module")
def measured(cache, params):  # noqa: F811
    return measure(cache, params)


def test_the_clips_are_those_that_are_not_trained_on_and_fit(cache, measured, tmp_path):
    names = cache.ids(measured[0].clips.indices)
    assert names == [f"clip-{10 + n}" for n in range(len(GRIDS))]
    few = HeldOutClips(
        dataclasses.replace(CONFIG, held_out=dataclasses.replace(CONFIG.held_out, clips=3)), cache, BYTES
    )
    assert cache.ids(few.indices) == ["clip-10", "clip-13", "clip-16"]
    assert not HeldOutClips(dataclasses.replace(CONFIG, split="test"), write_cache(tmp_path / "c", [TEST_ONLY]), BYTES)


def by_hand(cache, weights, index: int, level: int) -> tuple[float, float]:
    """Time and mean squared error of the velocity of one clip, packed alone, written out anew."""
    latent = np.asarray(cache[index], np.float32)
    caption, clip_id = cache.column("captions")[index].as_py()[0], int(cache.clip_ids[index])
    tokens = patchify(latent, CONFIG.model.patch)

    def key(purpose: int):
        root = jax.random.key(np.uint32(0), impl="threefry2x32")
        root = jax.random.fold_in(jax.random.fold_in(root, level), purpose)
        return jax.random.fold_in(root, np.uint32(clip_id))

    u = (level + jax.random.uniform(key(13), dtype=jnp.float32)) / CONFIG.held_out.levels
    t = jax.nn.sigmoid(jax.scipy.special.ndtri(u))
    alpha = np.sqrt(len(tokens) / CONFIG.diffusion.times.base_tokens)
    t = float(alpha * t / (1 + (alpha - 1) * t))
    noise = [
        jax.random.normal(jax.random.fold_in(key(14), n), tokens.shape[1:], jnp.float32) for n in range(len(tokens))
    ]
    text = BYTES.encode(caption)
    sizes = PackingConfig(len(tokens), 1, len(text), CONFIG.model.patch)
    packed = pack_batch([[PackItem(latent, clip_id, text)]], sizes)
    x = (1 - t) * tokens + t * np.stack(noise)
    pack = Pack(**{name: jnp.asarray(x) for name, x in packed.items()})
    found = denoise(weights[MODEL], CONFIG.model, pack, jnp.asarray(x)[None], jnp.full((1, 1), t))
    return t, float(np.square(np.asarray(found[0]) - (np.stack(noise) - tokens)).mean())


@pytest.mark.parametrize("clip, level", [(1, 0), (4, 3)])
def test_a_clip_has_the_loss_that_it_has_by_hand(cache, params, measured, clip, level):  # noqa: F811
    held_out, losses, _ = measured
    assert losses.weight[clip, level] == np.prod(GRIDS[clip]) / 4
    time, wanted = by_hand(cache, params, held_out.clips.indices[clip], level)
    np.testing.assert_allclose(losses.time[clip, level], time, rtol=1e-4)
    np.testing.assert_allclose(losses.loss[clip, level] / losses.weight[clip, level], wanted, rtol=1e-3)


def test_times_are_one_in_each_part_of_the_distribution_and_every_noise_is_another(measured):
    _, losses, _ = measured
    assert (np.diff(losses.time, axis=1) > 0).all() and len(np.unique(losses.time)) == losses.time.size
    assert len(np.unique(losses.loss)) == losses.loss.size


def test_the_means_are_of_tokens(measured):
    _, losses, found = measured
    np.testing.assert_allclose(found["held_out/loss"], losses.loss.sum() / losses.weight.sum())
    shares = {name: found[name] for name in found if "by_" in name and "noise" not in name}
    assert shares.keys() == {f"held_out/by_size/{s}" for s in ("16x16", "8x16")} | {
        f"held_out/by_frames/{t}" for t in (1, 5, 9)
    }
    short = [n for n, grid in enumerate(GRIDS) if grid[0] == 1]
    np.testing.assert_allclose(found["held_out/by_frames/1"], losses.loss[short].sum() / losses.weight[short].sum())
    bins = (losses.time * 10).astype(int)
    for i, value in enumerate(found["held_out/by_noise"]):
        chosen = bins == i
        wanted = losses.loss[chosen].sum() / losses.weight[chosen].sum() if chosen.any() else np.nan
        np.testing.assert_allclose(value, wanted)


def test_nothing_but_the_weights_changes_it(cache, params, measured):  # noqa: F811
    _, losses, found = measured
    again = measure(cache, params, dataclasses.replace(CONFIG, seed=7))[1]
    np.testing.assert_array_equal(again.loss, losses.loss)
    accumulated = dataclasses.replace(CONFIG, loop=dataclasses.replace(CONFIG.loop, accumulate=8))
    wide = dataclasses.replace(CONFIG, packing=dataclasses.replace(CONFIG.packing, length=48, slots=4))
    for config, devices, mesh in (
        (accumulated, 1, MeshConfig()),
        (CONFIG, 8, MeshConfig(fsdp=2)),
        (wide, 1, MeshConfig()),
    ):
        if config is wide:  # which takes the long clip, too
            few = dataclasses.replace(wide.held_out, clips=8)
            config = dataclasses.replace(wide, held_out=few)
        other = measure(cache, params, config, devices, mesh)
        kept = [other[0].clips.indices.index(index) for index in measured[0].clips.indices]
        np.testing.assert_allclose(other[1].loss[kept], losses.loss, rtol=1e-5)
        np.testing.assert_array_equal(other[1].time[kept], losses.time)
    changed = measure(cache, jax.tree.map(lambda x: 1.1 * x, params))[2]
    assert abs(changed["held_out/loss"] - found["held_out/loss"]) > 1e-3 * found["held_out/loss"]


def test_a_run_may_change_how_it_is_measured_and_old_ones_have_the_default():
    assert "held_out" in DENOISER.may_change
    old = {"kind": "transformer", "model": {"depth": 1}}
    assert stored_config(old).held_out.clips == 64
    with pytest.raises(UserError, match=r"^--config.held_out.levels is 0; it must be at least 1$"):
        run_config({"kind": "denoiser", "held_out": {"levels": 0}})
