"""Skip the blocks of the denoiser at steps that were chosen once for a run: MagCache (Ma et al. 2506.09045).

The residual of the trunk, its output minus its input, changes little from step to step, and the ratio of its norms
says how little. The ratios are nearly the same for all prompts, so one calibration serves a run: r_k, the mean over
tokens of |residual of step k| / |residual of step k - 1|. Behind a step that ran, the product of the ratios of the
steps since then estimates by how much the kept residual is wrong; steps are skipped while the sum of |1 - product| is
below an error and no more than `most` are skipped in a row. The first fifth of the steps is never skipped.

A skipped step adds the last residual to the tokens once more; embedding, modulation and head run at every step. The
steps are the same for all clips, so that what shares a pack with a clip does not change it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check, read_json
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.files import as_path, write_json
from sora_jax.models.denoiser import RunTrunk

Scales = float | Sequence[float] | None  # of guidance
FILE = "skipped_steps.json"
ALWAYS_RUN = 0.2  # share of the steps, from the first on


def choose_skipped(ratios_XK: np.ndarray, error: float, most: int) -> tuple[int, ...]:
    """Return the steps to skip, by MagCache's rule, which must hold for all X branches of guidance.

    ratios_XK: r_k of each branch; that of step 0 has no meaning. error: bound of the accumulated error. most: steps
    skipped in a row at most.
    """
    skipped: list[int] = []
    product_X, sum_X, row = np.ones(len(ratios_XK)), np.zeros(len(ratios_XK)), 0
    steps = ratios_XK.shape[1]
    for step in range(max(int(steps * ALWAYS_RUN), 1), steps):
        product_X, row = product_X * ratios_XK[:, step], row + 1
        sum_X = sum_X + np.abs(1 - product_X)
        if sum_X.max() < error and row <= most:
            skipped.append(step)
        else:
            product_X, sum_X, row = np.ones_like(product_X), np.zeros_like(sum_X), 0
    return tuple(skipped)


def reuse_trunk(
    skipped: Sequence[int], steps: int, kept_BLD: jax.Array, first: jax.Array | int = 0
) -> tuple[RunTrunk, jax.Ref]:
    """Return a caller of the trunk for one solve, and where it keeps the residual.

    Its calls are step `first` and those behind it; the steps of `skipped` reuse the residual. kept_BLD: the residual
    that was kept before step `first`; for step 0, zeros in the shape of the trunk's tokens.
    """
    runs_K = jnp.asarray(~np.isin(np.arange(steps), skipped))
    # Mutable arrays: a solver calls the model as a function of tokens and times, and need not know of this state.
    step, kept = jax.new_ref(jnp.int32(first)), jax.new_ref(kept_BLD)

    def run(trunk: Callable[[jax.Array], jax.Array], x_BLD: jax.Array) -> jax.Array:
        residual_BLD = kept[...]

        def compute() -> tuple[jax.Array, jax.Array]:
            y_BLD = trunk(x_BLD)
            return y_BLD, y_BLD - x_BLD

        y_BLD, new_BLD = jax.lax.cond(runs_K[step[...]], compute, lambda: (x_BLD + residual_BLD, residual_BLD))
        kept[...] = new_BLD
        step[...] = step[...] + 1
        return y_BLD

    return run, kept


def watch_trunk(steps: int, zeros_BLD: jax.Array, segments_BL: jax.Array) -> tuple[RunTrunk, jax.Ref]:
    """Return a caller of the trunk for one solve, and where it leaves r_k (steps,); r_0 is 1."""
    length = segments_BL.shape[1]
    step, ratios_K = jax.new_ref(jnp.int32(0)), jax.new_ref(jnp.ones(steps))
    kept = jax.new_ref(_norms(zeros_BLD[:, :length]))

    def run(trunk: Callable[[jax.Array], jax.Array], x_BLD: jax.Array) -> jax.Array:
        y_BLD = trunk(x_BLD)
        before_BL, norm_BL = kept[...], _norms((y_BLD - x_BLD)[:, :length])
        counts_BL = (segments_BL > 0) & (before_BL > 0)
        ratio_BL = jnp.where(counts_BL, norm_BL / jnp.where(counts_BL, before_BL, 1.0), 0.0)
        ratios_K[step[...]] = jnp.where(counts_BL.any(), ratio_BL.sum() / jnp.maximum(counts_BL.sum(), 1), 1.0)
        kept[...] = norm_BL
        step[...] = step[...] + 1
        return y_BLD

    return run, ratios_K


def _norms(x_BLD: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(x_BLD.astype(jnp.float32)).sum(-1))


def save_skipped(folder: Path, sampling: SamplingConfig, guidance: Scales, facts: dict) -> Path:
    """Keep `sampling.skipped` in a run folder, in the place of what was kept for the same steps, solver and guidance.

    guidance: one scale or one for each clip; None: that of `sampling`. facts: what else is kept of the calibration.
    Returns the file.
    """
    key, file = _key(sampling, guidance), as_path(folder) / FILE
    others = [entry for entry in _entries(folder) if entry["for"] != key]
    write_json(file, {"schedules": [*others, {"for": key, "skipped": list(sampling.skipped)} | facts]})
    return file


def read_skipped(folder: Path, sampling: SamplingConfig, guidance: Scales = None) -> tuple[int, ...]:
    """Return the steps that a run folder says to skip, see `save_skipped`.

    Raises:
        UserError: the run was not calibrated for these steps, this solver, and guidance or none.
    """
    key = _key(sampling, guidance)
    found = [entry["skipped"] for entry in _entries(folder) if entry["for"] == key]
    what = ", ".join(f"{name} {value}" for name, value in key.items())
    check(found, f"--skip-steps is given; sora-jax calibrate --workdir={folder} must be run for {what} first")
    return tuple(found[0])


def _key(sampling: SamplingConfig, guidance: Scales) -> dict:
    guided = bool(np.any(np.asarray(sampling.guidance.scale if guidance is None else guidance) != 1))
    return {"steps": sampling.steps, "spacing": sampling.spacing, "solver": sampling.solver.name, "guided": guided}


def _entries(folder: Path) -> Sequence[dict]:
    file = as_path(folder) / FILE
    return read_json(file)["schedules"] if file.exists() else []
