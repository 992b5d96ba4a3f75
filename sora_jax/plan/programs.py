"""The programs of a run as they would be compiled: the real functions, with abstract arrays in place of values."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from sora_jax.config import choose
from sora_jax.data.packing import PackItem, pack_batch
from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.sampling import SamplingConfig, sample
from sora_jax.diffusion.solvers import Problem
from sora_jax.generate.sampler import PACKS_AT_ONCE, solve_packs
from sora_jax.models.first_stage import autoencoder_specs, decode, encode
from sora_jax.models.flops import autoencoder_train_flops, forward_flops, product_flops
from sora_jax.models.transformer import transformer_specs
from sora_jax.nn import params as param
from sora_jax.nn.pack import Pack
from sora_jax.parallel.compile import abstract_batch, on_mesh, use
from sora_jax.parallel.mesh import check_split
from sora_jax.parallel.rules import parts, reshard
from sora_jax.train.autoencoder import AutoencoderRun, autoencoder_loss
from sora_jax.train.denoiser import DenoiserRun, denoiser_loss
from sora_jax.train.optim import make_optimizer
from sora_jax.train.state import TrainState
from sora_jax.train.step import make_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function, its abstract arguments, what of them is which (by name, for the report), and what it is for.

    model_flops: of one call on all devices. tokens: clips' tokens or pixels that a call works through; unit names them.
    activations: what the forward pass keeps for the backward pass, of one micro-batch.
    """

    function: Callable
    arguments: tuple
    held: dict[str, object]
    model_flops: float
    tokens: int
    unit: str
    activations: tuple = ()


def for_accelerator(config):
    """The config with the dtype that it leaves to the accelerator; attention looks at the devices of the mesh."""
    if getattr(config.model, "dtype", None) != "auto":
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))


def program(config: AutoencoderRun | DenoiserRun, what: str, mesh: Mesh | AbstractMesh) -> Program:
    """The program of a run that does `what`: see `maker`; `mesh` may be abstract."""
    return maker(config, what)(for_accelerator(config), mesh)


def maker(config: AutoencoderRun | DenoiserRun, what: str) -> Callable:
    """What makes the program: train, or sample of a transformer, or autoencoder (encode and decode) of one."""
    kinds = {"transformer": {"train": train, "sample": sampler}}
    kinds["autoencoder"] = {"train": train, "autoencoder": reconstruct}
    return choose(f"--what, for a config of kind {config.kind!r},", what, kinds[config.kind])


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


def train(config: AutoencoderRun | DenoiserRun, mesh: Mesh) -> Program:
    """The whole training step: loss and gradient, optimizer, averages of the parameters."""
    make_batch, loss = (_crops, autoencoder_loss) if config.kind == "autoencoder" else (_packs, _denoiser_loss)
    batch, model_flops, tokens, unit = make_batch(config, mesh)
    optim = dataclasses.replace(config.optim, decay_steps=config.optim.decay_steps or config.loop.steps)
    state = abstract_state(specs_of(config), make_optimizer(optim), len(optim.ema), mesh)
    step = make_step(functools.partial(loss, config), make_optimizer(optim), optim.ema, optim.ema_warmup)
    held = {
        "parameters": state.params,
        "optimizer": (state.step, state.opt_state),
        "averages": state.ema,
        "batch": batch,
    }
    kept = activations(functools.partial(loss, config), state.params, batch, mesh)
    return Program(step, (state, batch), held, model_flops, tokens, unit, kept)


def activations(loss: Callable, params, batch, mesh: Mesh) -> tuple:
    """What differentiating a loss keeps, but for the parameters: abstract arrays on `mesh`."""

    def kept(params, batch):
        micro = jax.tree.map(lambda x: x[0], batch)
        return jax.vjp(lambda params: loss(params, micro, 0, 0)[0], params)[1]

    with use(mesh):
        leaves = jax.tree.leaves(on_mesh(jax.eval_shape(kept, params, batch), mesh))
    known = Counter((x.shape, x.dtype) for x in jax.tree.leaves(params))
    found = []
    for leaf in leaves:
        key = leaf.shape, leaf.dtype
        if known[key]:
            known[key] -= 1
        else:
            found.append(leaf)
    return tuple(found)


def specs_of(config: AutoencoderRun | DenoiserRun) -> dict:
    """All parameters of a run."""
    return (autoencoder_specs if config.kind == "autoencoder" else transformer_specs)(config.model)


def _denoiser_loss(config: DenoiserRun, params, pack: Pack, step, part):
    return denoiser_loss(config, params, pack, step)


def abstract_state(specs, optimizer, averages: int, mesh: Mesh) -> TrainState:
    """What `train.state.init_state` makes, as shapes with shardings."""
    param.check_splits(specs, mesh)
    params = param.abstract_on(specs, mesh)
    with use(mesh):
        opt_state = on_mesh(jax.eval_shape(optimizer.init, params), mesh)
    return TrainState(on_mesh(jax.ShapeDtypeStruct((), jnp.int32), mesh), params, (params,) * averages, opt_state)


def full_pack(config: DenoiserRun) -> dict[str, np.ndarray]:
    """A batch of one pack, filled by a single clip and its text by a caption: all that is computed is used."""
    packs, text = config.packs, config.model.text
    frames = packs.length * packs.patch[0]
    latent = np.zeros((frames, *packs.patch[1:], config.model.latent_channels), np.float32)
    words = packs.text_length if text else 1
    pretrained = np.zeros((words, text.pretrained_width), np.float16) if text and text.pretrained else None
    return pack_batch([[PackItem(latent, 1, np.full(words, 2, np.int32), pretrained)]], packs)


def _packs(config: DenoiserRun, mesh: Mesh):
    """The batch of a step as the loop places it, its model FLOPs, and its tokens."""
    accumulate, row = config.loop.accumulate, full_pack(config)
    _check_packs(config, config.batch // accumulate, mesh)
    rows = _many(row, (accumulate, config.batch // accumulate))
    pack = Pack(**rows)
    if config.diffusion.times.stratified:
        pack = pack.replace(ranks_BS=jax.ShapeDtypeStruct(pack.clip_ids_BS.shape, jnp.float32))
    flops = 3 * config.batch * forward_flops(config.model, row)
    return abstract_batch(pack, mesh, leading=1), flops, config.batch * config.packs.length, "tokens"


def _check_packs(config: DenoiserRun, packs: int, mesh: Mesh) -> None:
    check_split(mesh, "batch", packs, "config.batch / config.loop.accumulate")
    check_split(mesh, "length", config.packing.length, "config.packing.length")
    if config.model.text:
        check_split(mesh, "length", config.packing.text_length, "config.packing.text_length")


def _many(row: dict, leading: tuple[int, ...]) -> dict:
    """Abstract arrays of so many rows, of the arrays of a batch of one."""
    return {name: jax.ShapeDtypeStruct((*leading, *x.shape[1:]), x.dtype) for name, x in row.items()}


def _crops(config: AutoencoderRun, mesh: Mesh):
    frames, height, width = config.crop
    accumulate, batch, flops, pixels = config.loop.accumulate, {}, 0.0, 0
    for (name, rows), length in zip(config.rows.items(), (frames, 1), strict=True):
        if not rows:
            continue
        option = f"the number of {name} in config.batch / loop.accumulate"
        check_split(mesh, "batch", rows // accumulate, option)
        shape = (accumulate, rows // accumulate, length, height, width, 3)
        batch[f"{name}_BTHW3"] = jax.ShapeDtypeStruct(shape, jnp.uint8)
        flops += rows * autoencoder_train_flops(config.model, length, height, width)
        pixels += rows * length * height * width
    return abstract_batch(batch, mesh, leading=1), flops, pixels, "pixels"


# ----------------------------------------------------------------------------------------------------------
# Using what was trained
# ----------------------------------------------------------------------------------------------------------


def sampler(config: DenoiserRun, mesh: Mesh) -> Program:
    """The whole solver, guided if the config guides: noise to latents of the packs that one call takes."""
    split = parts("batch", mesh)
    packs = -(-PACKS_AT_ONCE // split) * split
    _check_packs(config, packs, mesh)
    specs = transformer_specs(config.model)
    param.check_splits(specs, mesh)
    params, row = param.abstract_on(specs, mesh), full_pack(config)
    batch = abstract_batch(Pack(**_many(row, (packs,))), mesh)
    guides = config.sampling.guidance.scale != 1.0
    guidance = dataclasses.replace(config.sampling.guidance, scale=1.0)
    sampling = dataclasses.replace(config.sampling, guidance=guidance)
    scale = abstract_batch(jax.ShapeDtypeStruct((packs, config.packing.slots), jnp.float32), mesh)
    seed = on_mesh(jax.ShapeDtypeStruct((), jnp.uint32), mesh)
    function = jax.jit(lambda params, seed, *rest: solve_packs(params, config, sampling, seed, *rest))
    calls = evaluations(config, sampling) * (2 if guides else 1)
    flops = packs * _sampling_flops(config, row, calls, 2 if guides else 1)
    arguments = (params, seed, batch, batch if guides else None, scale)
    held = {"parameters": params, "batch": arguments[2:]}
    return Program(function, arguments, held, flops, packs * config.packs.length, "tokens")


def _sampling_flops(config: DenoiserRun, row: dict, calls: int, captions: int) -> float:
    """Of one pack: the captions are encoded once, the rest is done at every evaluation."""
    whole = forward_flops(config.model, row)
    if not config.model.text:
        return calls * whole
    silent = forward_flops(config.model, row, text_encoder=False)
    return captions * (whole - silent) + calls * silent


def evaluations(config: DenoiserRun, sampling: SamplingConfig) -> int:
    """How often a solver calls its model: counted in its trace, by products that a model of one product would do."""
    width = config.model.patch_values
    tokens = jax.ShapeDtypeStruct((1, 2, width), jnp.float32)

    def traced(products: int):
        def solved(x, weight):
            def denoise(x, _t):
                for _ in range(products):
                    x = x @ weight
                return jnp.concatenate([x, x], -1) if config.model.learned_variance else x

            process = process_named(config.diffusion.process)
            rows = jnp.zeros((1, 2), jnp.int32)
            variance = "learned" if config.model.learned_variance else sampling.solver.variance
            problem = Problem(denoise, config.diffusion.prediction, process, rows, lambda step: x, variance)
            return sample(sampling, config.diffusion.times, problem, x, jnp.full((1, 1), 2))

        return product_flops(jax.make_jaxpr(solved)(tokens, jax.ShapeDtypeStruct((width, width), jnp.float32)).jaxpr)

    return round((traced(1) - traced(0)) / (2 * 2 * width * width))


def reconstruct(config: AutoencoderRun, mesh: Mesh) -> Program:
    """Encoding and decoding a batch of clips of the training size."""
    frames, height, width = config.crop
    split = parts("batch", mesh)
    clips = -(-config.batch // split) * split
    specs = autoencoder_specs(config.model)
    params = param.abstract_on(specs, mesh)
    video = abstract_batch(jax.ShapeDtypeStruct((clips, frames, height, width, 3), jnp.float32), mesh)
    axes = ("batch", None, None, None, None)
    there = lambda params, x: reshard(encode(params, config.model, x)[0], *axes)  # noqa: E731
    function = jax.jit(lambda params, x: decode(params, config.model, there(params, x)))
    flops = clips * autoencoder_train_flops(config.model, frames, height, width) / 3
    held = {"parameters": params, "batch": video}
    return Program(function, (params, video), held, flops, math.prod(video.shape[:-1]), "pixels")
