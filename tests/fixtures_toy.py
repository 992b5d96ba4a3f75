"""The smallest job that the loop takes, to see what the loop does; it also runs in processes of its own."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.data.shard_spec import ShardSpec
from sora_jax.errors import LostPeer, Stopped
from sora_jax.nn.params import ParamSpec, normal
from sora_jax.parallel import distributed
from sora_jax.parallel.mesh import make_mesh
from sora_jax.train.loop import Job, LoopConfig, fit
from sora_jax.train.optim import OptimConfig
from sora_jax.train.state import MODEL, Group

ROOT = Path(__file__).parents[1]


@pytest.fixture
def kill(monkeypatch):
    """The script of the experiment; its processes find the tests."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "reliability"))
    import kill

    return kill


SPECS = {"weight": ParamSpec((4,), (None,), normal(1.0))}
OPTIM = OptimConfig(0.1, warmup_steps=0)
GROUPS = {MODEL: Group(SPECS, OPTIM)}


def toy_loss(params, frozen, batch, step, part):
    """Squared distance to the batch; the root has no finite slope where `root` is 0."""
    weight = params[MODEL]["weight"]
    error = jnp.square(weight[None] - batch["x"]).sum(-1) + jnp.sqrt(batch["root"] * weight[0] ** 2)
    return {MODEL: error.sum()}, ({MODEL: jnp.float32(error.shape[0])}, {})


def toy_job(at=None, preview=None, share=ShardSpec(), optim=OPTIM) -> Job:
    """`at` maps a step to what happens while its batch is made: changes to the batch, or None."""

    def batches(start, position):
        step = start
        assert position == (start or None)  # what was saved with the step before
        while True:
            x = np.random.default_rng(step).standard_normal((2, 4)).astype(np.float32)
            batch = {"x": x, "root": np.ones(2, np.float32), "clip": np.array([100 + step, 200 + step])}
            step += 1
            batch |= (at or {}).get(step, dict)() or {}
            yield {name: np.split(rows, share.count)[share.index] for name, rows in batch.items()}, step

    return Job(
        name="toy",
        groups={MODEL: Group(SPECS, optim)},
        loss=toy_loss,
        batches=batches,
        to_device=lambda batch: batch,
        counts=lambda batch: {"clips": len(batch["x"]), "tokens": 3 * len(batch["x"]), "capacity": 4 * len(batch["x"])},
        clip_ids=lambda batch: batch["clip"].tolist(),
        preview=preview,
        share=share,
    )


def train(workdir, job=None, optim=OPTIM, devices=1, **options):
    workdir.mkdir(exist_ok=True)
    config = LoopConfig(**(dict(steps=10, log_every=1, save_every=2) | options))
    return fit(job or toy_job(optim=optim), config, 0, make_mesh(devices=jax.devices()[:devices]), workdir, {})


def train_slowly(workdir, **options) -> int:
    """Steps of a few milliseconds, so that a kill meets one."""
    pause = dict.fromkeys(range(1, 1000), lambda: time.sleep(0.003))
    train(workdir, toy_job(pause), **options)
    return 0


def one_of_two(process: int, port: int, heartbeat_timeout: int, devices: int, function, *arguments, **options) -> int:
    """Run `function` as one of two processes with so many devices each; `heartbeat_timeout` is in seconds."""
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_enable_compilation_cache", False)  # it serves the first alone, and Gloo waits half a minute
    distributed.HEARTBEAT_TIMEOUT = heartbeat_timeout
    distributed.start(f"127.0.0.1:{port}", 2, process)
    return function(*arguments, **options)


def train_half(workdir, **options) -> int:
    """This process's half of the job, as slow as `train_slowly`; ends as the command does."""
    pause = dict.fromkeys(range(1, 1000), lambda: time.sleep(0.02))
    share = distributed.share_of_batch(make_mesh())
    try:
        train(workdir, toy_job(pause, share=share), devices=2, **options)
    except Stopped as stopped:
        print(stopped)
        return 130
    except LostPeer as lost:
        print(lost)
        return lost.code
    return 0
