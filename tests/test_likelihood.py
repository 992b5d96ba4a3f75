"""Likelihood by the probability-flow ODE, against the exact density of a mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_diffusion import quick_jit
from fixtures_mixtures import PLANE, gaussian, perfect
from mixture import draw_data, log_density

from sora_jax.diffusion.likelihood import ClipTokens, LikelihoodConfig, ascending_times, log_likelihood
from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.solvers import Problem
from sora_jax.errors import UserError

# Three clips of 3, 2 and 4 tokens and three places of padding, twice; the second pack in another order.
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 3, 3, 3, 3, 0, 0, 0], [1, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0, 0]], jnp.int32)
INDEX = jnp.array([[0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 0, 0], [0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 0, 0]], jnp.int32)
ROWS = jnp.maximum(SEGMENTS - 1, 0)


def tokens():
    first = np.asarray(draw_data(PLANE, jax.random.key(0), 12)).reshape(12, 2)
    second = first[[5, 6, 7, 8, 0, 1, 2, 3, 4, 9, 10, 11]]
    return jnp.asarray(np.stack([first, second]), jnp.float32)


def times_of(process, steps, packs=2, rows=3):
    times = jnp.asarray(ascending_times(process, steps), jnp.float32)
    return jnp.broadcast_to(times[:, None, None], (steps + 1, packs, rows))


def measured(config, problem, x_BLP, times_KBR, segments_BL=SEGMENTS, index_BL=INDEX, slots=3):
    clips = ClipTokens(segments_BL, index_BL, slots)
    return quick_jit(lambda x, t: log_likelihood(config, problem, x, t, clips))(x_BLP, times_KBR)


def exact(x_BLP):
    of_token = np.asarray(log_density(PLANE, x_BLP))
    return np.stack([[of_token[b][np.asarray(SEGMENTS)[b] == s].sum() for s in (1, 2, 3)] for b in (0, 1)])


@pytest.mark.parametrize("method, steps, bound", [("heun", 96, 0.02), ("rk4", 32, 0.004)])
@pytest.mark.parametrize("name", ["linear_flow", "vp_scaled_linear_zero_snr", "edm"])
def test_likelihood_is_exact_in_the_limit(name, method, steps, bound):
    process, x_BLP = process_named(name), tokens()
    found = measured(LikelihoodConfig(method), perfect(process, "v", ROWS), x_BLP, times_of(process, steps))
    np.testing.assert_allclose(found.nats_BS, exact(x_BLP), atol=bound * 8)
    np.testing.assert_array_equal(found.values_BS, [[6, 4, 8], [8, 6, 4]])
    bits = found.bits_per_dimension()
    np.testing.assert_allclose(bits, -exact(x_BLP) / np.log(2) / [[6, 4, 8], [8, 6, 4]], atol=bound * 3)


def test_a_wider_model_is_less_likely():
    """The likelihood is the model's: of a Gaussian that is too wide it is that of the wide one."""
    process, x_BLP = process_named("linear_flow"), tokens()
    found = measured(
        LikelihoodConfig("rk4"), perfect(process, "v", ROWS, gaussian(0.0, 1.6, 2)), x_BLP, times_of(process, 24)
    )
    of_token = np.sum(-0.5 * (np.asarray(x_BLP) / 1.6) ** 2 - np.log(1.6) - 0.5 * np.log(2 * np.pi), axis=2)
    wanted = [[of_token[b][np.asarray(SEGMENTS)[b] == s].sum() for s in (1, 2, 3)] for b in (0, 1)]
    np.testing.assert_allclose(found.nats_BS, wanted, atol=0.02)


def mixing(segments_BL, prediction_type="v"):
    """A model whose tokens see the others of their clip, with a full Jacobian inside it."""
    same_BLL = (segments_BL[:, :, None] == segments_BL[:, None, :]) & (segments_BL > 0)[:, :, None]
    share_BLL = same_BLL / jnp.maximum(same_BLL.sum(axis=2, keepdims=True), 1)
    rows_BL = jnp.maximum(segments_BL - 1, 0)

    def denoise(x_BLP, t_BR):
        mean_BLP = jnp.einsum("blm,bmp->blp", share_BLL, jnp.sin(x_BLP) + 0.3 * x_BLP[:, :, ::-1])
        return jnp.tanh(0.5 * x_BLP + mean_BLP) * 0.7

    def noise(step):
        # Keyed by the clip (its number of tokens tells it) and the token.
        count_BL = same_BLL.sum(axis=2)
        index_BL = jnp.cumsum(jnp.ones_like(segments_BL), axis=1) - 1 - jnp.argmax(same_BLL, axis=2)
        key = jax.random.fold_in(jax.random.key(3), step)
        draw = jax.vmap(jax.vmap(lambda clip, i: jax.random.normal(jax.random.fold_in(key, 100 * clip + i), (2,))))
        return draw(count_BL, index_BL)

    return Problem(denoise, prediction_type, process_named("linear_flow"), rows_BL, noise)


@pytest.mark.parametrize("probes", [0, 3])
def test_packed_equals_alone(probes):
    config, process, x_BLP = LikelihoodConfig(probes=probes), process_named("linear_flow"), tokens()
    packed = np.asarray(measured(config, mixing(SEGMENTS), x_BLP, times_of(process, 6)).nats_BS)
    for slot, start, stop in ((0, 0, 3), (1, 3, 5), (2, 5, 9)):
        segments_BL = jnp.ones((1, stop - start), jnp.int32)
        alone = measured(
            config, mixing(segments_BL), x_BLP[:1, start:stop], times_of(process, 6, 1, 1), segments_BL,
            INDEX[:1, start:stop], 1,
        )  # fmt: skip
        np.testing.assert_allclose(packed[0, slot], alone.nats_BS[0, 0], rtol=2e-5)


def test_probes_estimate_the_exact_divergence():
    process, x_BLP = process_named("linear_flow"), tokens()
    exact, few, many = (
        np.asarray(measured(LikelihoodConfig(probes=n), mixing(SEGMENTS), x_BLP, times_of(process, 4)).nats_BS)
        for n in (0, 1, 256)
    )
    assert np.abs(many - exact).max() < 0.15 < np.abs(few - exact).max()


def test_padding_and_empty_slots_add_nothing():
    process, x_BLP = process_named("linear_flow"), tokens()
    wild_BLP = jnp.where((SEGMENTS > 0)[:, :, None], x_BLP, 1e30)
    calm, wild = (
        measured(LikelihoodConfig(), mixing(SEGMENTS), x, times_of(process, 3), slots=4) for x in (x_BLP, wild_BLP)
    )
    np.testing.assert_array_equal(calm.nats_BS, wild.nats_BS)
    np.testing.assert_array_equal(np.stack([calm.nats_BS, calm.values_BS])[:, :, 3], 0)
    assert np.all(np.isfinite(wild.bits_per_dimension()))


def test_given_tokens_are_no_part_of_the_density():
    """Of independent tokens, those held at time 0 leave the density of the others as it is."""
    process, x_BLP = process_named("linear_flow"), tokens()[:1]
    segments_BL, index_BL = jnp.ones((1, 12), jnp.int32), jnp.arange(12, dtype=jnp.int32)[None]
    rows_BL = (index_BL >= 4).astype(jnp.int32)
    times_KBR = times_of(process, 24, 1, 2).at[:, :, 0].set(0.0)
    problem = perfect(process, "v", rows_BL)
    found = measured(LikelihoodConfig("rk4"), problem, x_BLP, times_KBR, segments_BL, index_BL, 1)
    assert found.values_BS[0, 0] == 16
    np.testing.assert_allclose(found.nats_BS[0, 0], log_density(PLANE, x_BLP)[0, 4:].sum(), atol=0.05)


def test_mistakes_are_told():
    with pytest.raises(UserError, match="likelihood.method is 'euler'; allowed: 'heun', 'rk4'"):
        LikelihoodConfig("euler")
    with pytest.raises(UserError, match="likelihood.probes is -1; it must be 0"):
        LikelihoodConfig(probes=-1)
    process = process_named("linear_flow")
    with pytest.raises(UserError, match="noise is None; with likelihood.probes = 1 it must be given"):
        measured(LikelihoodConfig(probes=1), perfect(process, "v", ROWS), tokens(), times_of(process, 2))
