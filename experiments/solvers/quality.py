"""How good is each solver at equal model evaluations? On a mixture of Gaussians, where the truth is known.

    python experiments/solvers/quality.py

Prints Markdown tables and writes quality.png beside this file; about five minutes of one core.
"""

import argparse
import functools
import platform
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from scipy import integrate

from sora_jax.diffusion.process import initial, process_named
from sora_jax.diffusion.solvers import Problem, SolverConfig, evaluations, is_stochastic, solve
from sora_jax.diffusion.spacing import base_times

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # the oracle of the solvers' tests
from mixture import denoiser, draw_data, petals, posterior_means

matplotlib.use("agg")
import matplotlib.pyplot as plt

BUDGETS = (5, 10, 20, 50, 250)
MIXTURE = petals()
SAMPLES, FOLLOWED = 20_000, 500
EXACT = 20  # exact draws for each sample, in a comparison of distributions
ANGLES = np.pi * np.arange(32) / 32
# process -> the rows of its table: a label, a solver and the spacing of its times. Churn is a share of the steps.
ROWS = {
    "linear_flow": {
        **{name: (SolverConfig(name), "even") for name in ("euler", "heun", "midpoint", "rk4", "ddim")},
        **{name: (SolverConfig(name), "even") for name in ("dpm2", "dpm3", "unipc", "unipc3", "edm")},
        **{name: (SolverConfig(name), "even") for name in ("ddpm", "euler_sde", "heun_sde")},
        "edm, churn": (SolverConfig("edm", churn=0.2), "even"),
    },
    "vp_scaled_linear": {
        **{name: (SolverConfig(name), "trailing") for name in ("euler", "heun", "midpoint", "rk4", "ddim")},
        **{name: (SolverConfig(name), "trailing") for name in ("dpm2", "dpm3", "unipc", "unipc3", "edm")},
        **{f"{name}, karras": (SolverConfig(name), "karras") for name in ("ddim", "dpm2", "unipc", "edm")},
        **{name: (SolverConfig(name), "trailing") for name in ("ddpm", "euler_sde", "heun_sde")},
        "edm, churn": (SolverConfig("edm", churn=0.2), "trailing"),
    },
}


def steps_within(config: SolverConfig, budget: int) -> int:
    """The most steps that the budget of evaluations allows, at least one."""
    return max(n for n in range(1, budget + 1) if n == 1 or evaluations(config, n) <= budget)


@functools.partial(jax.jit, static_argnums=(0, 1))
def samples(config, name, eps_BLP, times_K):
    """Samples (N, 2) from noise (1, N, 2)."""
    process, rows_BL = process_named(name), jnp.zeros(eps_BLP.shape[:2], jnp.int32)

    def noise(step):
        return jax.random.normal(jax.random.fold_in(jax.random.key(11), step), eps_BLP.shape)

    problem = Problem(denoiser(MIXTURE, process, "v", rows_BL), "v", process, rows_BL, noise)
    x_BLP = initial(process, eps_BLP, jnp.ones((1, 1, 1)))
    return solve(config, problem, x_BLP, times_K[:, None, None])[0]


def exact_ends(name, eps):
    """The probability-flow ODE from noise (N, 2) to data, in float64, by SciPy's DOP853."""
    process, end = process_named(name), 1e-5
    with jax.enable_x64(True):

        @jax.jit
        def predicted(t, x):
            means = posterior_means(MIXTURE, process.a(t), process.b(t), x)
            slopes = [jax.jvp(f, (t,), (jnp.ones_like(t),))[1] for f in (process.a, process.b)]
            return means[0], slopes[0] * means[0] + slopes[1] * means[1]

        def velocity(t, flat):
            return np.asarray(predicted(jnp.float64(t), jnp.asarray(flat.reshape(-1, 2)))[1]).ravel()

        start = np.asarray(initial(process, jnp.asarray(eps, jnp.float64), jnp.float64(1.0))).ravel()
        solved = integrate.solve_ivp(velocity, (1.0, end), start, method="DOP853", rtol=1e-8, atol=1e-9)
        return np.asarray(predicted(jnp.float64(end), jnp.asarray(solved.y[:, -1].reshape(-1, 2)))[0])


def quantiles(points):
    """Sorted projections (N, 32) of points (N, 2), float32."""
    return np.sort((points @ np.stack([np.cos(ANGLES), np.sin(ANGLES)])).astype(np.float32), axis=0)


def exact_quantiles():
    """Those of SAMPLES points in the place of all data: means of EXACT neighbours among many draws."""
    return quantiles(exact_draws(1, SAMPLES * EXACT)).reshape(SAMPLES, EXACT, -1).mean(axis=1)


def exact_draws(seed, count):
    return np.asarray(draw_data(MIXTURE, jax.random.key(seed), count))


def sliced_wasserstein(points, exact):
    """Mean over directions of the Wasserstein-1 distance of projections."""
    return float(np.mean(np.abs(quantiles(points) - exact)))


def measure(name, eps_BLP, exact):
    """label -> [(evaluations, sliced Wasserstein distance, error against the exact ODE or None)]."""
    wanted = exact_ends(name, eps_BLP[0, :FOLLOWED])
    table = {}
    for label, (config, spacing) in ROWS[name].items():
        table[label] = []
        for budget in BUDGETS:
            steps = steps_within(config, budget)
            chosen = SolverConfig(**{**vars(config), "churn": config.churn * steps})
            times_K = jnp.asarray(base_times(name, steps, spacing), jnp.float32)
            found = np.asarray(samples(chosen, name, eps_BLP, times_K))
            error = None if is_stochastic(config) else float(np.sqrt(np.mean((found[:FOLLOWED] - wanted) ** 2)))
            table[label].append((evaluations(config, steps), sliced_wasserstein(found, exact), error))
    return table


def print_table(name, table, floor):
    heads = " | ".join(map(str, BUDGETS))
    print(f"\n**{name}**, sliced Wasserstein distance x 1000 (as many exact draws: {1000 * floor:.1f})\n")
    print(f"| solver | {heads} |\n| --- |{' --- |' * len(BUDGETS)}")
    for label, row in table.items():
        print(f"| {label} | " + " | ".join(f"{1000 * distance:.1f}" for _, distance, _ in row) + " |")
    print(f"\n**{name}**, root mean square error against the exact solution of the ODE, x 1000\n")
    print(f"| solver | {heads} |\n| --- |{' --- |' * len(BUDGETS)}")
    for label, row in table.items():
        if row[0][2] is not None:
            print(f"| {label} | " + " | ".join(f"{1000 * error:.3g}" for _, _, error in row) + " |")


def draw_plot(tables, floor, path):
    figure, axes = plt.subplots(
        2, len(tables), figsize=(6.5 * len(tables), 9), sharex=True, sharey="row", squeeze=False
    )
    markers = "osv^<>DPX*hd"
    for column, (name, table) in zip(axes.T, tables.items(), strict=True):
        for place, (label, row) in enumerate(table.items()):
            style = {
                "marker": markers[place % len(markers)],
                "color": plt.cm.tab20(place % 20),
                "markersize": 5,
                "linewidth": 1.2,
            }
            calls, distances, errors = zip(*row, strict=True)
            column[0].loglog(calls, distances, label=label, linestyle="--" if errors[0] is None else "-", **style)
            if errors[0] is not None:
                column[1].loglog(calls, errors, label=label, **style)
        column[0].axhline(floor, color="grey", linewidth=0.8)
        column[0].set(title=name, ylabel="sliced Wasserstein distance")
        column[1].set(xlabel="model evaluations", ylabel="error against the exact ODE", xticks=BUDGETS)
        column[1].set_xticklabels(BUDGETS)
        column[1].minorticks_off()
        column[0].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "quality.png")
    out = parser.parse_args().out
    exact = exact_quantiles()
    floor = float(np.mean([sliced_wasserstein(exact_draws(seed, SAMPLES), exact) for seed in range(2, 12)]))
    eps_BLP = jax.random.normal(jax.random.key(0), (1, SAMPLES, 2))
    print(f"Python {platform.python_version()}, jax {jax.__version__}; {SAMPLES} samples, {FOLLOWED} followed")
    tables = {name: measure(name, eps_BLP, exact) for name in ROWS}
    for name, table in tables.items():
        print_table(name, table, floor)
    draw_plot(tables, floor, out)


if __name__ == "__main__":
    main()
