"""Times, noise, loss and sampling on explicit meshes of eight devices equal one device.

The check runs in a process of its own, since the number of devices is fixed when JAX starts.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sora_jax.diffusion.guidance import guided
from sora_jax.diffusion.keys import Purpose, step_key, token_noise
from sora_jax.diffusion.loss import denoising_loss, loss_weight
from sora_jax.diffusion.process import linear_flow
from sora_jax.diffusion.solvers import Problem, heun
from sora_jax.diffusion.times import TimesConfig, draw_times, per_token, sampling_times

B, L, S, P = 8, 16, 3, 4


def room(segments_BL, index_BL, clips_BS, tokens_BS):
    """Everything in the diffusion room that a train step and a sampler call."""
    rows_BL = jnp.maximum(segments_BL - 1, 0)
    clips_BL = jnp.where(segments_BL > 0, per_token(clips_BS, rows_BL), 0)
    noise_BLP = token_noise(step_key(0, 3, Purpose.NOISE), clips_BL, index_BL, P)
    t_BR = draw_times(TimesConfig(), step_key(0, 3, Purpose.TIME), clips_BS, tokens_BS)
    weight_BL = loss_weight(segments_BL, t_BR, rows_BL)

    def loss(scale):
        tokens = jnp.sin(noise_BLP), noise_BLP, t_BR, rows_BL, weight_BL
        sums = denoising_loss(lambda x, t: scale * x, linear_flow, "velocity", *tokens)
        return sums.loss, sums

    sums, slope = jax.value_and_grad(loss, has_aux=True)(jnp.float32(0.7))
    model = guided(lambda x, t: jnp.tanh(x), lambda x, t: -x, 4.0 * t_BR, segments_BL)
    times_KBR = sampling_times(TimesConfig(), 4, tokens_BS)
    samples_BLP = heun(Problem(model, "velocity", linear_flow, rows_BL), noise_BLP, times_KBR)
    return noise_BLP, t_BR, sums, slope, samples_BLP


def inputs():
    rng = np.random.default_rng(0)
    segments_BL = np.sort(rng.integers(0, S + 1, (B, L)))[:, ::-1].astype(np.int32)
    index_BL = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    clips_BS = rng.integers(1, 2**32, (B, S), dtype=np.uint32)
    return segments_BL, index_BL, clips_BS, rng.integers(1, 999, (B, S)).astype(np.int32)


def compare(shape, token_spec):
    reference = jax.jit(room)(*inputs())
    mesh = jax.make_mesh(shape, ("packs", "tokens"), axis_types=(AxisType.Explicit,) * 2)
    specs = (token_spec, token_spec, PartitionSpec("packs"), PartitionSpec("packs"))
    with jax.set_mesh(mesh):
        placed = zip(inputs(), specs, strict=True)
        sharded = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in placed]
        found = jax.jit(room)(*sharded)
    assert jax.typeof(found[0]).sharding.spec == PartitionSpec(*token_spec, *[None] * (3 - len(token_spec)))
    np.testing.assert_array_equal(found[0], reference[0])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, reference)


def test_meshes_agree():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    compare((8, 1), PartitionSpec("packs"))
    compare((2, 4), PartitionSpec("packs", "tokens"))
