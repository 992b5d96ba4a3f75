"""The metric `likelihood`: a density that is known, and a value of a clip that nothing around the clip changes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_copies import BYTES, params  # noqa: F401
from test_held_out import CONFIG, GRIDS, cache  # noqa: F401

from sora_jax.diffusion.times import per_token
from sora_jax.evaluate import likelihood
from sora_jax.evaluate.likelihood import LikelihoodOptions, clip_bits, summarise
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.train.held_out import HeldOutClips
from sora_jax.train.state import MODEL

QUICK = LikelihoodOptions(steps=2)


def bits(cache, params, options=QUICK, config=CONFIG, mesh=MeshConfig(), devices=1, seed=0):  # noqa: F811
    """The bits of the clips that CONFIG takes."""
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:devices])):
        clips = HeldOutClips(config, cache, BYTES)
        found = clip_bits(config, options, params[MODEL], clips, seed)
    names = cache.ids(clips.indices)
    return np.array([found[names.index(f"clip-{10 + n}")] for n in range(len(GRIDS))])


@pytest.mark.parametrize("probes", [0, 1])  # one probe is exact where the Jacobian is a multiple of the identity
def test_a_gaussian_has_the_bits_that_it_has_by_hand(cache, params, monkeypatch, probes):  # noqa: F811
    deviation = 1.6

    def network(params, config, pack, condition=None):
        def velocity(x_BLP, t_BR):  # E[eps - x_0 | x_t] for x_0 ~ N(0, deviation^2) under the linear flow
            t = per_token(t_BR, pack.rows_BL)[:, :, None]
            data, noise = jnp.square(deviation * (1 - t)), jnp.square(t)
            return x_BLP * (noise - data / jnp.maximum(1 - t, 1e-7) * t) / (t * (data + noise))

        return velocity

    monkeypatch.setattr(likelihood, "network", network)
    jax.clear_caches()  # the program of another network has the same arguments
    found = bits(cache, params, LikelihoodOptions("rk4", probes=probes, steps=24))
    jax.clear_caches()
    for n, index in enumerate(HeldOutClips(CONFIG, cache, BYTES).indices):
        x = np.asarray(cache[index], np.float64)
        nats = -0.5 * np.square(x / deviation) - math.log(deviation) - 0.5 * math.log(2 * math.pi)
        np.testing.assert_allclose(found[n], -nats.mean() / math.log(2), atol=2e-3)


def test_nothing_around_a_clip_changes_its_bits(cache, params):  # noqa: F811
    whole = bits(cache, params)
    assert len(set(whole)) == len(whole) and np.isfinite(whole).all()
    # Each in a pack of its own, a pack at a time; and on two devices.
    packing = dataclasses.replace(CONFIG.packing, length=20, slots=1)
    alone = dataclasses.replace(CONFIG, packing=packing, loop=dataclasses.replace(CONFIG.loop, accumulate=8))
    for config, mesh, devices in ((alone, MeshConfig(), 1), (CONFIG, MeshConfig(fsdp=2), 2)):
        np.testing.assert_allclose(bits(cache, params, QUICK, config, mesh, devices), whole, rtol=1e-4)
    assert (bits(cache, params, seed=1) != whole).all()  # other probes


def test_a_mean_is_over_clips():
    values = np.array([1.0, 2.0, 4.5])
    found = summarise(values)
    assert found["bits_per_dimension"] == 2.5 and found["clips"] == 3
    np.testing.assert_allclose(found["standard_error"], values.std(ddof=1) / math.sqrt(3))
    assert summarise(values[:1])["standard_error"] is None
