"""The smallest job that the loop takes, to see what the loop does; it also runs in processes of its own."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.nn.params import ParamSpec, normal
from sora_jax.parallel.mesh import make_mesh
from sora_jax.train.loop import Job, LoopConfig, fit
from sora_jax.train.optim import OptimConfig

SPECS = {"weight": ParamSpec((4,), (None,), normal(1.0))}
OPTIM = OptimConfig(0.1, warmup_steps=0)


def toy_loss(params, batch, step, part):
    """Squared distance to the batch; the root has no finite slope where `root` is 0."""
    error = jnp.square(params["weight"] - batch["x"]).sum(-1) + jnp.sqrt(batch["root"] * params["weight"][0] ** 2)
    return error.sum(), (jnp.float32(error.shape[0]), {})


def toy_job(at=None, preview=None) -> Job:
    """`at` maps a step to what happens while its batch is made: changes to the batch, or None."""

    def batches(start, position):
        step = start
        assert position == (start or None)  # what was saved with the step before
        while True:
            x = np.random.default_rng(step).standard_normal((2, 4)).astype(np.float32)
            batch = {"x": x, "root": np.ones(2, np.float32), "clip": np.array([100 + step, 200 + step])}
            step += 1
            yield batch | ((at or {}).get(step, dict)() or {}), step

    return Job(
        name="toy",
        specs=SPECS,
        loss=toy_loss,
        batches=batches,
        to_device=lambda batch: batch,
        counts=lambda batch: {"clips": 2, "tokens": 6, "places": 8},
        clip_ids=lambda batch: batch["clip"].tolist(),
        preview=preview,
    )


def train(workdir, job=None, optim=OPTIM, **options):
    workdir.mkdir(exist_ok=True)
    config = LoopConfig(**(dict(steps=10, log_every=1, save_every=2) | options))
    return fit(job or toy_job(), config, optim, 0, make_mesh(devices=jax.devices()[:1]), workdir, {})


def train_slowly(workdir, **options) -> int:
    """Steps of a few milliseconds, so that a kill meets one."""
    pause = dict.fromkeys(range(1, 1000), lambda: time.sleep(0.003))
    train(workdir, toy_job(pause), **options)
    return 0
