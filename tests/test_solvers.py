"""What every solver keeps: rows with their own times, tokens that are held, one trajectory for all predictions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_diffusion import quick_jit
from fixtures_mixtures import PLANE, down, gaussian, grid, one_row, perfect
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sora_jax.diffusion.prediction import FORMS, from_x0_and_eps
from sora_jax.diffusion.process import edm, linear_flow, process_named
from sora_jax.diffusion.sampling import SamplingConfig, sample
from sora_jax.diffusion.solvers import SOLVERS, Problem, SolverConfig, evaluations, is_stochastic, solve
from sora_jax.diffusion.times import TimesConfig, per_token
from sora_jax.errors import UserError

# Every solver, and again with the options that make it draw.
CONFIGS = {name: SolverConfig(name) for name in SOLVERS}
CONFIGS |= {"ddim, eta": SolverConfig("ddim", eta=0.7), "edm, churn": SolverConfig("edm", churn=3.0)}
# One of each sort of step: those left out differ by a number from one that is in.
STEPS = {name: config for name, config in CONFIGS.items() if name not in ("dpm1", "dpm2", "unipc")}
every_solver = pytest.mark.parametrize("config", STEPS.values(), ids=STEPS)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def drawn(shape):
    """Noise that differs from step to step and from token to token."""
    return lambda step: jax.random.normal(jax.random.fold_in(jax.random.key(0), step), shape, jnp.float32)


def run(config, problem, x_BLP, times_KBR):
    return np.asarray(quick_jit(lambda x, times: solve(config, problem, x, times))(x_BLP, times_KBR))


@functools.partial(quick_jit, static_argnums=(0, 1, 2))
def bent(config, name, prediction_type, x_BLP, rows_BL, times_KBR, noise_NBLP):
    """The solution for a model that is cheap to compile and has no symmetry, with noise from a table."""

    def denoise(x_BLP, t_BR):
        return jnp.tanh(x_BLP * 0.8 + per_token(jnp.cos(3.0 * t_BR), rows_BL)[:, :, None])

    problem = Problem(denoise, prediction_type, process_named(name), rows_BL, lambda step: noise_NBLP[step])
    return solve(config, problem, x_BLP, times_KBR)


def together():
    """Four packs of sixteen tokens on four rows: two grids, a held row, and a grid that stands still on its way."""
    rows_BL = np.stack([np.random.default_rng(seed).permutation(np.arange(16) % 4) for seed in range(4)])
    halting = np.insert(down(5), 3, down(5)[3])
    times_KBR = jnp.tile(grid(down(6), down(6) ** 1.5, 0 * down(6), halting), (1, 4, 1))
    return normal((4, 16, 2)), jnp.asarray(rows_BL, jnp.int32), times_KBR, normal((6, 4, 16, 2), 1)


@every_solver
def test_rows_keep_their_own_times(config):
    """Clips on different grids in one pack end as they do alone; a row held at time 0 keeps every bit.

    A row that stands still on the way ends where it would have ended without, whatever is remembered.
    """
    x_BLP, rows_BL, times_KBR, noise_NBLP = together()
    packed = np.asarray(bent(config, "linear_flow", "v", x_BLP, rows_BL, times_KBR, noise_NBLP))
    for row in range(3):
        mine = np.asarray(rows_BL)[0] == row
        arrays = x_BLP[:1, mine], one_row(4), times_KBR[:, :1, row : row + 1], noise_NBLP[:, :1, mine]
        alone = bent(config, "linear_flow", "v", *arrays)
        np.testing.assert_allclose(packed[:1, mine], alone, atol=2e-5, rtol=1e-5)
        assert (row == 2) == np.array_equal(packed[:1, mine], x_BLP[:1, mine])
    mine = np.asarray(rows_BL)[0] == 3
    # The churn is that of the whole grid, so a grid of one step less has less of it.
    fewer = dataclasses.replace(config, churn=config.churn * 5 / 6)
    times_KB1, noise_NBLP = jnp.delete(times_KBR, 3, axis=0)[:, :1, 3:], jnp.delete(noise_NBLP, 3, axis=0)
    alone = bent(fewer, "linear_flow", "v", x_BLP[:1, mine], one_row(4), times_KB1, noise_NBLP[:, :1, mine])
    np.testing.assert_allclose(packed[:1, mine], alone, atol=2e-5, rtol=1e-5)


@every_solver
def test_number_of_model_evaluations(config):
    calls = []

    def denoise(x_BLP, t_BR):
        jax.debug.callback(lambda t: calls.append(float(t)), t_BR[0, 0])
        return x_BLP

    problem = Problem(denoise, "velocity", linear_flow, one_row(2), drawn((1, 2, 1)))
    run(config, problem, jnp.ones((1, 2, 1)), grid(down(8)))
    jax.effects_barrier()
    assert len(calls) == evaluations(config, 8) and min(calls) > 0


@pytest.mark.parametrize("name", ["euler", "heun", "ddpm", "dpm3", "unipc", "heun_sde", "edm, churn"])
def test_one_step_of_the_linear_flow_is_the_prediction(name):
    x_BLP, clean_BLP = jnp.full((1, 4, 2), 0.3), jnp.arange(8.0).reshape(1, 4, 2)
    problem = Problem(lambda x, t: clean_BLP.astype(jnp.bfloat16), "x0", linear_flow, one_row(4), drawn((1, 4, 2)))
    ends = run(CONFIGS[name], problem, x_BLP, grid(down(1)))
    assert ends.dtype == np.float32
    np.testing.assert_allclose(ends, clean_BLP, atol=2e-6)


@pytest.mark.parametrize(
    "name, solver",
    [("linear_flow", "heun"), ("vp_linear", "dpm2"), ("trigonometric", "unipc"), ("vp_scaled_linear_zero_snr", "ddim")],
)
def test_all_predictions_give_one_trajectory(name, solver):
    """From t = 0.9: at t = 1 an eps prediction says little about x_0."""
    process, rows_BL = process_named(name), one_row(12)

    def trajectory(prediction_type, x_BLP, times_KBR):
        def denoise(x_BLP, t_BR):
            t_BL1 = per_token(t_BR, rows_BL)[:, :, None]
            clean_BLP = jnp.tanh(x_BLP)
            noise_BLP = (x_BLP - process.a(t_BL1) * clean_BLP) / process.b(t_BL1)
            return from_x0_and_eps(process, prediction_type, clean_BLP, noise_BLP, t_BL1)

        problem = Problem(denoise, prediction_type, process, rows_BL)
        return solve(SolverConfig(solver), problem, x_BLP, times_KBR)

    trajectories = quick_jit(lambda *arguments: {form: trajectory(form, *arguments) for form in FORMS})
    found = trajectories(normal((1, 12, 2)), grid(down(9, 0.9)))
    for prediction_type in FORMS:
        np.testing.assert_allclose(found[prediction_type], found["v"], atol=2e-5, err_msg=prediction_type)


@pytest.mark.parametrize("name", ["heun", "ddpm", "dpm3", "unipc", "edm"])
def test_eps_predictions_start_safely_from_pure_noise(name):
    """Where a = 0 an eps prediction cannot say x_0; the mean of normalised data takes its place, for one step."""
    x_BLP, noise, times_KBR = normal((1, 33, 2)), drawn((1, 33, 2)), grid(down(64))
    problems = [perfect("linear_flow", form, one_row(33), gaussian(width=2), noise=noise) for form in ("eps", "v")]
    np.testing.assert_allclose(*[run(CONFIGS[name], problem, x_BLP, times_KBR) for problem in problems], atol=0.02)


@pytest.mark.parametrize(
    "name, solver", [("linear_flow", "heun"), ("linear_flow", "unipc"), ("vp_cosine", "dpm2"), ("edm", "edm")]
)
def test_one_gaussian_has_a_closed_form(name, solver):
    """Data N(0.4, 0.8^2): the flow keeps every token's rank, from t = 1 all the way to t = 0."""
    process, one, n = process_named(name), jnp.float32(1.0), np.linspace(-2.0, 2.0, 9)
    a, b = float(process.a(one)), float(process.b(one))
    x_BLP = jnp.asarray(0.4 * a + np.hypot(0.8 * a, b) * n, jnp.float32)[None, :, None]
    ends = run(SolverConfig(solver), perfect(name, "v", one_row(9), gaussian(0.4, 0.8)), x_BLP, grid(down(60)))
    np.testing.assert_allclose(ends[0, :, 0], 0.4 + 0.8 * n, atol=0.012)


@every_solver
def test_meshes_agree(config):
    """Packs and tokens split over explicit mesh axes: the same tokens, sharded as they came."""
    arrays = together()
    wanted = bent(config, "linear_flow", "v", *arrays)
    mesh = jax.make_mesh((2, 4), ("packs", "tokens"), axis_types=(AxisType.Explicit,) * 2)
    specs = ("packs", "tokens"), ("packs", "tokens"), (None, "packs"), (None, "packs", "tokens")
    with jax.set_mesh(mesh):
        shardings = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]
        found = bent(config, "linear_flow", "v", *jax.device_put(arrays, tuple(shardings)))
    assert jax.typeof(found).sharding.spec == PartitionSpec("packs", "tokens", None)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["euler", "ddpm", "dpm3", "unipc", "heun_sde", "dpm2_sde", "edm"])
def test_clipping_holds_every_solver_to_the_bound(name):
    """A model whose x_0 is beyond it by far, and learns its variance; what lies inside is not changed."""

    def ends(size, bound):
        def denoise(x_BLP, t_BR):
            t_BL1 = per_token(t_BR, one_row(4))[:, :, None]
            clean_BLP = jnp.broadcast_to(size * jnp.linspace(-1.0, 1.0, 4)[None, :, None], x_BLP.shape)
            y_BLP = (x_BLP - clean_BLP) / t_BL1  # the velocity of the linear flow
            return jnp.concatenate([y_BLP, x_BLP], axis=-1)

        problem = Problem(denoise, "velocity", linear_flow, one_row(4), drawn((1, 4, 2)))
        config = SamplingConfig("6", solver=SolverConfig(name), clip_x0=bound)
        times, tokens_BR = TimesConfig(base_tokens=0), jnp.ones((1, 1), jnp.int32)
        return np.asarray(quick_jit(lambda eps: sample(config, times, problem, eps, tokens_BR))(normal((1, 4, 2))))

    wanted = np.clip(5.0 * np.linspace(-1, 1, 4), -0.5, 0.5)[None, :, None]
    np.testing.assert_allclose(ends(5.0, 0.5), np.broadcast_to(wanted, (1, 4, 2)), atol=1e-5)
    np.testing.assert_allclose(ends(0.4, 0.5), ends(0.4, 0.0), atol=1e-5)


def test_ddim_is_euler_in_sigma():
    """Karras et al. write DDIM as Euler's method for x in sigma, where a = 1."""
    x_BLP = 3.0 * normal((1, 9, 2))
    problem = perfect("edm", "eps", one_row(9))
    times = down(6, 0.6)
    sigma = np.asarray(edm.b(jnp.asarray(times, jnp.float32)))
    wanted = x_BLP
    denoise = quick_jit(problem.denoise)
    for t, here, there in zip(times, sigma, sigma[1:], strict=False):
        wanted = wanted + (there - here) * denoise(wanted, jnp.full((1, 1), t, jnp.float32))
    np.testing.assert_allclose(run(SolverConfig("ddim"), problem, x_BLP, grid(times)), wanted, atol=1e-5)


def test_a_model_that_learns_its_variance_is_solved_by_its_first_half():
    x_BLP = normal((1, 6, 2))
    plain = perfect("vp_linear", "eps", one_row(6))
    wide = Problem(
        lambda x, t: jnp.concatenate([plain.denoise(x, t), 9 * x], axis=2), "eps", plain.process, plain.rows_BL
    )
    np.testing.assert_array_equal(
        *[run(SolverConfig("dpm2"), problem, x_BLP, grid(down(5))) for problem in (plain, wide)]
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SolverConfig("rk5"), "solver is 'rk5'; allowed: 'euler', 'heun', 'midpoint', 'rk4', 'ddpm', .*"),
        (lambda: SolverConfig("ddim", eta=1.5), "solver.eta is 1.5; it must be from 0 to 1"),
        (lambda: SolverConfig(coefficient="cubic"), "solver.coefficient is 'cubic'; allowed: 'sigma', .*"),
        (lambda: SolverConfig(last_step="none"), "solver.last_step is 'none'; allowed: 'tweedie', 'mean', 'euler'"),
        (lambda: SolverConfig(coefficient_scale=-1.0), "solver.coefficient_scale is -1.0; it must be 0 or more"),
        (lambda: SolverConfig(churn=-1.0), "solver.churn is -1.0; it must be 0 or more, and finite"),
        (lambda: SolverConfig("ddpm", variance="learned"), "solver.variance is 'learned'; allowed: 'lower', 'upper'"),
        (
            lambda: Problem(jnp.sin, "v", linear_flow, one_row(1), variance="both"),
            "variance is 'both'; allowed: 'lower', 'upper', 'learned'",
        ),
        (
            lambda: run(SolverConfig("ddpm"), perfect("vp", "v", one_row(2)), jnp.ones((1, 2, 2)), grid(down(2))),
            "noise is None; with a stochastic solver it must be given",
        ),
        (
            lambda: run(SolverConfig(), perfect("vp", "v", one_row(2)), jnp.ones((1, 2, 2)), grid([1.0])),
            "times has 1 of them; there must be at least 2",
        ),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_stochastic_solvers_are_those_that_need_noise():
    for config in CONFIGS.values():
        problem = perfect("linear_flow", "v", one_row(2), PLANE)
        try:
            jax.eval_shape(lambda x, t: solve(config, problem, x, t), jnp.ones((1, 2, 2)), grid(down(3)))  # noqa: B023
            assert not is_stochastic(config)
        except UserError:
            assert is_stochastic(config)
