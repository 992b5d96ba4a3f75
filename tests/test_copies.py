"""Copies of a clip in one step: each has draws of its own, wherever and however the step is computed."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_caches import clip_row, write_cache
from fixtures_runs import TINY
from scipy import stats

from sora_jax.config import load
from sora_jax.data.feeding.pipeline import COPY, PackedBatches
from sora_jax.data.feeding.tokenizer import TokenizerConfig, train
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.clips import clip_id_of
from sora_jax.kinds import run_config
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import abstract
from sora_jax.parallel.mesh import make_mesh, place_batch
from sora_jax.train.denoiser import denoiser_groups, denoiser_job, denoiser_loss, to_pack
from sora_jax.train.loop import split_batch
from sora_jax.train.state import MODEL
from sora_jax.train.step import gradients

BYTES = train([], TokenizerConfig(kind="bytes", max_tokens=12))
CLIP_IDS = [clip_id_of(f"clip-{n}") for n in range(7)]
SMALL = ("model.depth=1", "model.latent_channels=2", "model.text.vocabulary=300")
SMALL += ("packing.length=24", "packing.slots=3")


def config_of(*changes):
    return run_config(load(f"{TINY}:transformer", [*SMALL, *changes]))


def on_device(batch) -> Pack:
    return Pack(**{name: jnp.asarray(x) for name, x in batch.items()})


def batches_of(cache, config, **options):
    return PackedBatches(cache, BYTES, config.packs, config.batch, config.seed, **options)


@pytest.fixture(scope="module")
def one_clip(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("one") / "cache", [clip_row(0, (3, 4, 4))])


@pytest.fixture(scope="module")
def few_clips(tmp_path_factory):
    """Seven clips, of weights 1, 2 and 3, one of them in two variants."""
    rows = [clip_row(n, (1 + n % 3, 4, 4), weight=1.0 + n % 3) for n in range(6)]
    rows += [clip_row(6, (1, 4, 4), variant=v) for v in range(2)]
    return write_cache(tmp_path_factory.mktemp("few") / "cache", rows)


@pytest.fixture(scope="module")
def params():
    """Random weights: the gates of a model that has not been trained are closed."""
    rng = np.random.default_rng(0)
    specs = denoiser_groups(config_of())[MODEL].specs
    return {MODEL: jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), abstract(specs))}


def has_copies(batch) -> bool:
    """The ids of copies are those of no clip."""
    ids = batch["clip_ids_BS"]
    return not np.isin(ids[ids > 0], CLIP_IDS).all()


def test_ids_in_a_batch_differ_and_the_first_of_each_clip_keeps_its_own(few_clips):
    batches, most = batches_of(few_clips, config_of("batch=6")), 0
    for step in range(12):
        wanted, seen = [], {}
        for row in range(6 * step, 6 * step + 6):
            ids = few_clips.clip_ids[batches.clips(row)].tolist()
            for clip_id in ids:
                wanted.append((clip_id + seen.get(clip_id, 0) * int(COPY)) % 2**32)
                seen[clip_id] = seen.get(clip_id, 0) + 1
        found = batches[step]["clip_ids_BS"]
        assert found[found > 0].tolist() == wanted and len(set(wanted)) == len(wanted)
        most = max(most, *seen.values())
    assert most > 3


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_agree_on_which_copy_is_which(few_clips, hosts):
    config = config_of("batch=6")
    shares = [batches_of(few_clips, config, share=ShardSpec(host, hosts)) for host in range(hosts)]
    for step in (0, 5, 9):
        whole, parts = batches_of(few_clips, config)[step], [share[step] for share in shares]
        chex.assert_trees_all_equal({name: np.concatenate([p[name] for p in parts]) for name in whole}, whole)


GIVEN = ("diffusion.given.first=0.3", "diffusion.given.frames=0.3", "diffusion.caption_dropout=0.5")


def test_a_step_with_copies_does_not_depend_on_micro_batches_or_the_mesh(few_clips, params):
    config = config_of("batch=8", "diffusion.times.stratified=True", *GIVEN)
    batch, found = batches_of(few_clips, config)[1], []
    assert has_copies(batch)
    for devices, parts in ((1, 4), (8, 1)):
        mesh = make_mesh(devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            packs = to_pack(config.diffusion.times, place_batch(split_batch(batch, parts), mesh, leading=1))
            loss = jax.jit(lambda p, pack: denoiser_loss(config, p, (), pack, jnp.int32(7), jnp.int32(0))[0][MODEL])
            found.append(sum(float(loss(params, jax.tree.map(lambda x, i=i: x[i], packs))) for i in range(parts)))
    np.testing.assert_allclose(found, found[0], rtol=1e-5)


STEPS = 250


def test_eight_copies_of_one_clip_are_eight_draws(one_clip, params):
    """Gradients of a step of eight draws have an eighth of the variance: an F test at one in a thousand."""
    rng = np.random.default_rng(1)
    along = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), params[MODEL])

    def projected(size):
        config = config_of(f"batch={size}", "diffusion.caption_dropout=0.5", "packing.slots=1")
        pack = on_device(batches_of(one_clip, config)[0])
        loss = functools.partial(denoiser_loss, config)

        @jax.jit
        def one(step):
            gradient, sums, weights, _ = gradients(loss, params, (), pack, step, jnp.int32(0))
            dots = jax.tree.map(lambda g, d: (g * d).sum(), gradient[MODEL], along)
            return sum(jax.tree.leaves(dots)) / weights[MODEL], sums[MODEL] / weights[MODEL]

        return np.array([one(jnp.int32(step)) for step in range(STEPS)]).T

    (single, losses), (together, losses_together) = projected(1), projected(8)
    assert np.abs(losses - losses_together).max() > 0.01
    for one, eight in ((single, together), (losses, losses_together)):
        low, high = stats.f.ppf([0.0005, 0.9995], STEPS - 1, STEPS - 1)
        ratio = one.var() / eight.var()
        print(f"variance of one draw over that of eight: {ratio:.2f}")  # pytest -s shows it
        assert low < ratio / 8 < high
        assert abs(one.mean() - eight.mean()) < 4 * np.hypot(one.std(), eight.std()) / STEPS**0.5


def test_the_message_of_a_wrong_loss_names_the_clips_of_copies_whoever_has_them(few_clips):
    config, names = config_of("batch=6"), set()
    for host in range(2):
        share = ShardSpec(host, 2)
        batch = batches_of(few_clips, config, share=share)[0]
        assert has_copies(batch)
        names |= set(denoiser_job(config, few_clips, BYTES, share=share).clip_ids(batch))
    assert names == {f"clip-{n}" for n in range(7)}
