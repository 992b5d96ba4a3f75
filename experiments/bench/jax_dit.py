"""Run a DiT, forward and in training, by the package's own model, loss and `make_step`, on given noise and times."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from model import first_state

from sora_jax.diffusion.loss import Corruption, LossSpec, denoising_loss
from sora_jax.diffusion.process import process_named
from sora_jax.models.transformer import TransformerConfig, denoise
from sora_jax.nn.pack import Pack
from sora_jax.parallel.mesh import make_mesh, place_batch
from sora_jax.train.optim import OptimConfig, make_optimizer
from sora_jax.train.state import MODEL, Optimizer
from sora_jax.train.step import make_step


def make_loss(config: TransformerConfig):
    """Return DiT's hybrid loss for `make_step`; a batch holds pack, eps_BLP and times_BR."""
    spec = LossSpec(process_named("vp_linear"), "eps", learned_variance=True)

    def loss(params, _frozen, batch, _step, _part):
        pack = batch["pack"]
        model = functools.partial(denoise, params[MODEL], config, pack)
        data = Corruption(pack.tokens_BLP, batch["eps_BLP"], batch["times_BR"], pack.rows_BL)
        sums = denoising_loss(spec, model, data, (pack.segments_BL > 0).astype(jnp.float32))
        return {MODEL: sums.loss}, ({MODEL: sums.weight}, {})

    return loss


def make_runs(config: TransformerConfig, params: dict, hosts: list[dict]):
    """Return forward(i) and step(i) on the i-th host batch: the mean square of the output for noise alone; the loss."""
    mesh = make_mesh(devices=jax.devices()[:1])
    hosts = [{**host, "pack": Pack(**host["pack"])} for host in hosts]
    with jax.set_mesh(mesh):
        optimizer = Optimizer(make_optimizer(OptimConfig(1e-4, warmup_steps=0, b2=0.999, clip_norm=0.0)), ())
        state = first_state(jax.tree.map(jnp.asarray, params), optimizer)
        take = make_step(make_loss(config), {MODEL: optimizer})
        batches = [place_batch(host, mesh) for host in hosts]
        micro_batches = [place_batch(jax.tree.map(lambda x: x[None], host), mesh, leading=1) for host in hosts]

    @jax.jit
    def outputs(params, batch):
        return denoise(params, config, batch["pack"], batch["eps_BLP"], batch["times_BR"])

    def forward(i: int = 0) -> float:
        with jax.set_mesh(mesh):
            out = jax.block_until_ready(outputs(state.params[MODEL], batches[i]))
        return float(np.square(out).mean())

    def step(i: int = 0) -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = take(state, (), micro_batches[i])
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    return forward, step
