"""Times, noise, loss and sampling on explicit meshes of eight devices equal one device.

The check runs in a process of its own, since the number of devices is fixed when JAX starts.
"""

import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sora_jax.diffusion.guidance import GuidanceConfig, guided, guided_by_two
from sora_jax.diffusion.keys import Purpose, step_key, token_noise
from sora_jax.diffusion.loss import denoising_loss, loss_weight
from sora_jax.diffusion.process import linear_flow, vp_linear, vp_linear_zero_snr
from sora_jax.diffusion.solvers import Problem, SolverConfig, solve
from sora_jax.diffusion.times import TimesConfig, batch_ranks, draw_times, per_token, sampling_times
from sora_jax.diffusion.weights import WeightConfig

B, L, S, P, C = 8, 16, 3, 4, 2


def room(segments_BL, index_BL, clip_ids_BS, tokens_BS):
    """Everything in the diffusion room that a train step and a sampler call."""
    rows_BL = jnp.maximum(segments_BL - 1, 0)
    clip_ids_BL = jnp.where(segments_BL > 0, per_token(clip_ids_BS, rows_BL), 0)
    key = step_key(0, 3, Purpose.TIME)
    noise_BLP = token_noise(step_key(0, 3, Purpose.NOISE), clip_ids_BL, index_BL, P)
    t_BR = draw_times(TimesConfig(), key, clip_ids_BS, tokens_BS, None, linear_flow)
    steps = TimesConfig("steps", base_tokens=0, stratified=True)
    steps_BR = draw_times(steps, key, clip_ids_BS, tokens_BS, None, vp_linear)
    ranks_BS = batch_ranks(clip_ids_BS)
    sigma_BR = draw_times(TimesConfig("log_sigma", -1.2, 1.2), key, clip_ids_BS, tokens_BS, None, vp_linear)
    tokens = jnp.sin(noise_BLP), noise_BLP

    def flow(scale):
        where = t_BR, rows_BL, loss_weight(segments_BL, t_BR, rows_BL)
        sums = denoising_loss(lambda x, t: scale * x, linear_flow, "velocity", *tokens, *where)
        return sums.loss, sums

    def hybrid(scale):
        where = steps_BR, rows_BL, loss_weight(segments_BL, steps_BR, rows_BL)
        model = lambda x, t: scale * jnp.tile(x, (1, 1, 2))  # noqa: E731
        options = {"weighting": WeightConfig("min_snr"), "learned_variance": True}
        sums = denoising_loss(model, vp_linear, "eps", *tokens, *where, **options)
        return sums.loss, sums

    losses = [jax.value_and_grad(loss, has_aux=True)(jnp.float32(0.7)) for loss in (flow, hybrid)]
    layout = segments_BL, rows_BL, C
    models = jnp.tanh, jnp.negative, jnp.sin
    models = [lambda x, t, model=model: model(x) for model in models]
    config = GuidanceConfig(channels=1, rescale=0.5, start=0.1, power=2.0)
    model = guided(config, *models[:2], 4.0 * t_BR, *layout)
    two = guided_by_two(config, *models, 4.0 * t_BR, 2.0 * t_BR, *layout)(noise_BLP, t_BR)
    times_KBR = sampling_times(TimesConfig(), jnp.linspace(1.0, 0.0, 5), tokens_BS, linear_flow)
    curved_KBR = sampling_times(TimesConfig(), jnp.linspace(1.0, 0.0, 5), tokens_BS, vp_linear_zero_snr)
    problem = Problem(model, "velocity", linear_flow, rows_BL)
    samples_BLP = solve(SolverConfig("heun"), problem, noise_BLP, times_KBR)
    return noise_BLP, t_BR, steps_BR, ranks_BS, sigma_BR, losses, two, samples_BLP, curved_KBR


def inputs():
    rng = np.random.default_rng(0)
    segments_BL = np.sort(rng.integers(0, S + 1, (B, L)))[:, ::-1].astype(np.int32)
    index_BL = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    clip_ids_BS = rng.integers(1, 2**32, (B, S), dtype=np.uint32)
    return segments_BL, index_BL, clip_ids_BS, rng.integers(1, 999, (B, S)).astype(np.int32)


def compare(shape, token_spec):
    reference = jax.jit(room)(*inputs())
    mesh = jax.make_mesh(shape, ("packs", "tokens"), axis_types=(AxisType.Explicit,) * 2)
    specs = (token_spec, token_spec, PartitionSpec("packs"), PartitionSpec("packs"))
    with jax.set_mesh(mesh):
        placed = zip(inputs(), specs, strict=True)
        sharded = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in placed]
        found = jax.jit(room)(*sharded)
    np.testing.assert_array_equal(jax.jit(batch_ranks)(sharded[2]), reference[3])  # no mesh is set here
    assert jax.typeof(found[0]).sharding.spec == PartitionSpec(*token_spec, *[None] * (3 - len(token_spec)))
    np.testing.assert_array_equal(found[0], reference[0])
    chex.assert_trees_all_close(found, reference, rtol=1e-5, atol=1e-5)


def test_meshes_agree():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    compare((8, 1), PartitionSpec("packs"))
    compare((2, 4), PartitionSpec("packs", "tokens"))
