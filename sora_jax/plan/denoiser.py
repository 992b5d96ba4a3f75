"""The programs of the denoiser: its training step, and the whole solver of sampling."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.data.packing.packs import PackItem, pack_batch
from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.sampling import SamplingConfig, sample
from sora_jax.diffusion.solvers import Problem
from sora_jax.generate.packs import Conditions
from sora_jax.generate.sampler import PACKS_AT_ONCE, solve_packs
from sora_jax.models.denoiser import denoiser_specs, forward_flops, train_flops
from sora_jax.models.flops import product_flops
from sora_jax.nn import params as param
from sora_jax.nn.pack import Pack
from sora_jax.parallel.compile import abstract_batch, abstract_on_mesh
from sora_jax.parallel.mesh import check_split
from sora_jax.parallel.rules import parts
from sora_jax.plan.programs import AnyMesh, Load, Program, Trained, many, training_program
from sora_jax.train.denoiser import DenoiserRun, denoiser_groups, denoiser_loss, denoiser_parts

ROUND = 128  # tokens; a pack length is suggested in such steps


def full_pack(config: DenoiserRun) -> dict[str, np.ndarray]:
    """Make a batch of one pack, filled by a single clip and its text by a caption: all that is computed is used."""
    packs, text = config.packs, config.model.text
    size = np.multiply(grid_of_length(packs.length, packs.multiple), config.model.patch)
    latent = np.zeros((*size, config.model.latent_channels), np.float32)
    words = packs.text_length if text else 1
    pretrained = np.zeros((words, text.pretrained_width), np.float16) if text and text.pretrained else None
    item = PackItem(latent, 1, np.full(words, 2, np.int32), pretrained, low=latent[:, ::2, ::2])
    return pack_batch([[item]], packs)


def grid_of_length(length: int, multiple: tuple[int, int]) -> tuple[int, int, int]:
    """Return the grid (t, y, x) of so many tokens whose sides differ least; rows and columns are multiples.

    The work of networks with windows or convolutions depends on the grid. Without one of exactly that length: that of
    the least rows and columns.
    """
    sides = [range(step, math.isqrt(length) + 1, step) for step in multiple]
    grids = [(length // (y * x), y, x) for y, x in itertools.product(*sides) if length % (y * x) == 0]
    least = (length // math.prod(multiple), *multiple)
    return min(grids, key=lambda grid: max(grid) / min(grid), default=least)


def train_denoiser(config: DenoiserRun, mesh: AnyMesh) -> Program:
    """Make the training step on packs, as the loop places them."""
    accumulate, row = config.loop.accumulate, full_pack(config)
    _check_packs(config, config.batch // accumulate, mesh)
    arrays = many(row, (accumulate, config.batch // accumulate))
    if config.diffusion.times.stratified:
        arrays["ranks_BS"] = jax.ShapeDtypeStruct(arrays["clip_ids_BS"].shape, jnp.float32)
    load = load_of(config, config.batch * train_flops(config.model, row), config.batch)
    batch, loss = abstract_batch(Pack(**arrays), mesh, leading=1), functools.partial(denoiser_loss, config)
    trained = Trained(denoiser_groups(config), loss, fixed=denoiser_parts(config)[1])
    return training_program(config, trained, batch, load, mesh)


def sample_latents(config: DenoiserRun, mesh: AnyMesh) -> Program:
    """Make the whole solver, guided if the config guides: noise to latents of the packs that one call takes."""
    split = parts("batch", mesh)
    packs = -(-PACKS_AT_ONCE // split) * split
    _check_packs(config, packs, mesh)
    specs = denoiser_specs(config.model)
    param.check_splits(specs, mesh)
    params, row = param.abstract_on(specs, mesh), full_pack(config)
    empty = {name: x for name, x in row.items() if name != "tokens_BLP"}
    batch = abstract_batch(Pack(**many(empty, (packs,))), mesh)
    guides = config.sampling.guidance.scale != 1.0
    guidance = dataclasses.replace(config.sampling.guidance, scale=1.0)
    sampling = dataclasses.replace(config.sampling, guidance=guidance)
    scale = abstract_batch(jax.ShapeDtypeStruct((packs, config.packing.slots), jnp.float32), mesh)
    seed = abstract_on_mesh(jax.ShapeDtypeStruct((), jnp.uint32), mesh)
    function = jax.jit(functools.partial(solve_packs, config, sampling))
    calls = evaluations(config, sampling) * (2 if guides else 1)
    flops = packs * _sampling_flops(config, row, calls, 2 if guides else 1)
    conditions = Conditions(batch, batch if guides else None, scale)
    held = {"parameters": params, "batch": conditions}
    return Program(function, (params, seed, conditions), held, load_of(config, flops, packs))


def load_of(config: DenoiserRun, flops: float, packs: int) -> Load:
    """Describe what a call on so many packs works through."""
    packing = config.packing
    heads = getattr(config.model, "heads", None)
    splits = {"sequence": (packing.length, packing.text_length)} | ({"tensor": (heads,)} if heads else {})
    shorten = functools.partial(_shorter_packs, packing.length)
    return Load(flops, packs * packing.length, "tokens", packs, shorten, splits)


def _shorter_packs(length: int, factor: float) -> tuple[str, str]:
    """Return the option for shorter packs, whose activations grow with the tokens, and why."""
    shorter = max(int(length / factor) // ROUND, 1) * ROUND
    return f"--pack-length={shorter}", "the activations of a pack fill a chip"


def _check_packs(config: DenoiserRun, packs: int, mesh: AnyMesh) -> None:
    check_split(mesh, "batch", packs, "config.batch / config.loop.accumulate")
    check_split(mesh, "length", config.packing.length, "config.packing.length")
    if config.model.text:
        check_split(mesh, "length", config.packing.text_length, "config.packing.text_length")


def _sampling_flops(config: DenoiserRun, row: dict, calls: int, captions: int) -> float:
    """Return the FLOPs of one pack: captions are encoded once, the rest is done at every evaluation."""
    whole = forward_flops(config.model, row)
    silent = forward_flops(config.model, row, encodes_condition=False)
    return captions * (whole - silent) + calls * silent


def evaluations(config: DenoiserRun, sampling: SamplingConfig) -> int:
    """Count how often a solver calls its model: in its trace, by products that a model of one product would do."""
    width = config.model.patch_values
    tokens = jax.ShapeDtypeStruct((1, 2, width), jnp.float32)

    def traced(products: int) -> int:
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
