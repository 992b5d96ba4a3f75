"""Whole models on eight virtual devices: losses, gradients, a step of the optimizer and samples are those of one.

Tolerance: RELATIVE of the largest entry of each array. A sum of n float32 numbers in another order differs by about
sqrt(n) times 6e-8 of their size; the longest here are of some thousand terms (4e-6), one after another. What is wrong
is wrong by far more: a block of the ring left out changes the loss by 3e-4 of itself and samples by as much as they
are, zeros in place of the neighbours' rows change the autoencoder's loss by 2e-2.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import assert_near

from sora_jax.data.feeding.tokenizer import Tokenizer, TokenizerConfig
from sora_jax.data.packing.packs import PackingConfig
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.generate.packs import TrainedDenoiser
from sora_jax.generate.progress import Watch
from sora_jax.generate.requests import Known, Request
from sora_jax.generate.sampler import sample_latents
from sora_jax.models.autoencoder import AutoencoderConfig, autoencoder_specs
from sora_jax.models.denoiser import denoiser_specs
from sora_jax.models.text import TextConfig
from sora_jax.models.transformer import TransformerConfig
from sora_jax.models.unet_layers import UNetConfig
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import shardings
from sora_jax.parallel.mesh import MeshConfig, make_mesh, place_batch
from sora_jax.train.autoencoder import AutoencoderRun, autoencoder_loss
from sora_jax.train.denoiser import DenoiserRun, DiffusionConfig, denoiser_loss
from sora_jax.train.given import GivenConfig
from sora_jax.train.optim import OptimConfig, make_optimizer
from sora_jax.train.state import MODEL, Optimizer, TrainState
from sora_jax.train.step import make_step

# To 1e-5 of each array's largest entry; arrays smaller than a hundredth of the largest entry of all as if so large.
assert_same = functools.partial(assert_near, tolerance=1e-5, least=0.0, share=1e-2)
TEXT = TextConfig(vocabulary=300, width=16, depth=1, head_width=8)
NETWORK = TransformerConfig(
    depth=2, width=32, heads=4, latent_channels=2, text=TEXT, head_hidden=16, attention="blockwise", remat="none",
    dtype="float32",
)  # fmt: skip
UNET = UNetConfig(
    width=8, multipliers=(1,), blocks=1, attended=(0,), head_width=8, patch=(1, 2, 2), latent_channels=2, text=TEXT,
    attention="dense", remat="none", dtype="float32",
)  # fmt: skip
RUN = DenoiserRun(
    model=NETWORK,
    tokenizer=TokenizerConfig("bytes", max_tokens=16),
    packing=PackingConfig(length=40, slots=4, text_length=12, rows_per_clip=4),
    diffusion=DiffusionConfig(given=GivenConfig(first=0.2, frames=0.2, boxes=0.2, levels=0.2)),
    # Adam divides by the root of a gradient's square: where that is about eps, a step is a smooth function of it.
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-3, ema=(0.9,)),
)
MESHES = {  # data x fsdp (x tensor), and how the sequence is split
    "8x1": (MeshConfig(data=8), "gather"),
    "1x8": (MeshConfig(data=1, fsdp=8), "gather"),
    "2x2x2": (MeshConfig(data=2, fsdp=2, tensor=2), "gather"),
    "2 slices of 2x1, sequence 2, gather": (MeshConfig(slice=2, data=2, sequence=2), "gather"),
    "1x2, sequence 4, ring": (MeshConfig(data=1, fsdp=2, sequence=4), "ring"),
    "2x2, sequence 2, all_to_all": (MeshConfig(data=2, fsdp=2, sequence=2), "all_to_all"),
}


def remember_gradient() -> optax.GradientTransformation:
    """Changes nothing; its state is the last gradient."""
    return optax.GradientTransformation(lambda params: params, lambda gradient, _, params=None: (gradient, gradient))


def train(mesh, specs, loss, params, batch: dict, make_batch=dict):
    """Losses of two steps on one batch; of the first its gradient, and the parameters and their average after it."""
    transformation = optax.chain(remember_gradient(), make_optimizer(RUN.optim))
    optimizers = {MODEL: Optimizer(transformation, RUN.optim.ema)}
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(specs, mesh))
        average = jax.tree.map(lambda x: x.copy(), placed)
        opt_state = jax.jit(transformation.init)(placed)
        state = TrainState(jnp.zeros((), jnp.int32), {MODEL: placed}, {MODEL: (average,)}, {MODEL: opt_state})
        step = jax.jit(make_step(loss, optimizers))
        batch = make_batch(**place_batch({name: x[None] for name, x in batch.items()}, mesh, leading=1))
        state, first = step(state, (), batch)
        made = jax.device_get((state.opt_state[MODEL][0], state.params, state.ema))
        _, second = step(state, (), batch)
    assert abs(first["loss"] - second["loss"]) > 1e-3 * first["loss"]
    names = ("gradient", "parameters", "averages")
    return {"losses": [float(first["loss"]), float(second["loss"])]} | dict(zip(names, made, strict=True))


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


# ----------------------------------------------------------------------------------------------------------
# Transformer
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params(randomised):
    return jax.device_get(randomised(denoiser_specs(NETWORK)))


@pytest.fixture(scope="module")
def batch(clips, packed) -> dict:
    """Eight packs of different fillings."""
    rows = [clips[i % 3 : i % 4 + 1] or clips[:1] for i in range(8)]
    pack = packed(
        [[dataclasses.replace(c, clip_id=10 * i + c.clip_id % 97) for c in row] for i, row in enumerate(rows)],
        rows_per_clip=RUN.packing.rows_per_clip,
    )
    return {name: values for name, values in vars(pack).items() if values is not None}


def trained(mesh, params, batch, network=NETWORK, **model):
    run = dataclasses.replace(RUN, model=dataclasses.replace(network, **model))
    return train(mesh, denoiser_specs(network), functools.partial(denoiser_loss, run), params, batch, Pack)


@pytest.fixture(scope="module")
def trained_on_one(params, batch):
    """By dense attention: an implementation that none of the meshes uses."""
    return trained(one_device(), params, batch, attention="dense")


@pytest.mark.parametrize("name", MESHES)
def test_a_transformer_is_trained_as_on_one_device(params, batch, trained_on_one, name):
    mesh, sequence = MESHES[name]
    found = trained(make_mesh(mesh), params, batch, sequence=sequence)
    for what in trained_on_one:
        assert_same(found[what], trained_on_one[what])


FIRST = np.broadcast_to(np.array([0.0, 1.0, 1.0], np.float32)[:, None, None], (3, 4, 4))  # the first frame is given
LATENT = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
RING = Known(np.zeros((2, 4, 4, 2), np.float32), np.ones((2, 4, 4), np.float32), first=1, ring=True)
REQUESTS = [  # of several packs; one prompt is longer than packs have room for, by less than a mesh can split
    Request("red", (3, 4, 4), 11, guidance=3.0, known=Known(LATENT, FIRST)),
    Request("a green cat", (1, 4, 6), 22, guidance=2.0, negative="blue"),
    Request("sixteen letters", (2, 4, 4), 33, known=RING),
    Request("", (2, 6, 4), 44, guidance=3.0),
]


def sampled(mesh, params, settings=SamplingConfig(steps="2"), requests=REQUESTS, network=NETWORK, **model):
    run = dataclasses.replace(RUN, model=dataclasses.replace(network, **model))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(denoiser_specs(network), mesh))
        model = TrainedDenoiser(run, placed, Tokenizer(run.tokenizer), mesh)
        return sample_latents(model, requests, settings, 5, Watch(lambda done, total: None))  # in parts


@pytest.fixture(scope="module")
def sampled_on_one(params):
    return sampled(one_device(), params, attention="dense")


@pytest.mark.parametrize("name", [name for name in MESHES if "gather" not in name])
def test_samples_are_those_of_one_device(params, sampled_on_one, name):
    mesh, sequence = MESHES[name]
    found = sampled(make_mesh(mesh), params, sequence=sequence)
    assert [z.shape for z in found] == [(*request.size, 2) for request in REQUESTS]
    assert_same(found, sampled_on_one)


def test_samples_with_skipped_steps_are_those_of_one_device(params):
    """Skip steps on meshes: what a step reuses is split as the tokens are."""
    settings = SamplingConfig(steps="3", skipped=(1,))
    open_ends = [request for request in REQUESTS if request.known is not RING]
    found, expected = (
        sampled(make_mesh(mesh), params, settings, open_ends)
        for mesh in (MeshConfig(data=2, fsdp=1, sequence=2, tensor=2), MeshConfig(data=8))
    )
    assert_same(found, expected)
    assert_same(expected, sampled(one_device(), params, settings, open_ends, attention="dense"))


# ----------------------------------------------------------------------------------------------------------
# U-Net: every device has packs of its own; nothing else is split while the network runs
# ----------------------------------------------------------------------------------------------------------


UNET_MESH = MeshConfig(data=2, fsdp=2, sequence=2)


@pytest.fixture(scope="module")
def unet_params(randomised):
    return jax.device_get(randomised(denoiser_specs(UNET)))


def test_a_unet_is_trained_as_on_one_device(unet_params, batch):
    """All axes at once: parameters are split along `fsdp`, packs along `data`; those of `sequence` are copies."""
    expected, found = (trained(mesh, unet_params, batch, UNET) for mesh in (one_device(), make_mesh(UNET_MESH)))
    for what in expected:
        assert_same(found[what], expected[what])


def test_samples_of_a_unet_are_those_of_one_device(unet_params):
    """Given frames, an image, a ring and a clip, guided; attention by blocks on the mesh."""
    found = sampled(make_mesh(UNET_MESH), unet_params, network=UNET, attention="blockwise")
    expected = sampled(one_device(), unet_params, network=UNET)
    assert [z.shape for z in found] == [(*request.size, 2) for request in REQUESTS]
    assert_same(found, expected)


# ----------------------------------------------------------------------------------------------------------
# Autoencoder
# ----------------------------------------------------------------------------------------------------------

AUTOENCODER = AutoencoderRun(
    model=AutoencoderConfig(
        time_factor=2, space_factor=4, patch=(1, 2), multipliers=(1, 2), kernels=((2, 3, 3),),
        width=4, latent_channels=2, encoder_blocks=1, decoder_blocks=1, dtype="float32",
    ),
    crop=(3, 32, 8),
)  # fmt: skip
AUTOENCODER_MESHES = {
    "8x1": MeshConfig(data=8),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
    "1x1, sequence 8: a row each": MeshConfig(data=1, sequence=8),
    "2x2, sequence 2": MeshConfig(data=2, fsdp=2, sequence=2),
}


@pytest.fixture(scope="module")
def autoencoder_params(randomised):
    return jax.device_get(randomised(autoencoder_specs(AUTOENCODER.model)))


def autoencoder_trained(mesh, params):
    batch = {"videos_BTHW3": np.random.default_rng(0).integers(0, 256, (8, 3, 32, 8, 3), np.uint8)}
    loss = functools.partial(autoencoder_loss, AUTOENCODER)
    return train(mesh, autoencoder_specs(AUTOENCODER.model), loss, params, batch)


@pytest.fixture(scope="module")
def autoencoder_on_one(autoencoder_params):
    return autoencoder_trained(one_device(), autoencoder_params)


@pytest.mark.parametrize("name", AUTOENCODER_MESHES)
def test_an_autoencoder_is_trained_as_on_one_device(autoencoder_params, autoencoder_on_one, name):
    found = autoencoder_trained(make_mesh(AUTOENCODER_MESHES[name]), autoencoder_params)
    for what in autoencoder_on_one:
        assert_same(found[what], autoencoder_on_one[what])
