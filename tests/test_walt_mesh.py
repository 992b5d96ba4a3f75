"""W.A.L.T on eight virtual devices: losses, gradients, an update and samples are those of one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from compare import assert_near
from test_mesh_invariance import REQUESTS, RUN, TEXT, batch, one_device, train  # noqa: F401

from sora_jax.data.feeding.tokenizer import Tokenizer
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.generate.packs import TrainedDenoiser
from sora_jax.generate.progress import Watch
from sora_jax.generate.sampler import sample_latents
from sora_jax.models.walt import denoiser_specs
from sora_jax.models.walt_blocks import WaltConfig
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import shardings
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.train.denoiser import denoiser_loss

NETWORK = WaltConfig(
    depth=4,
    width=32,
    heads=4,
    patch=(1, 2, 2),
    latent_channels=2,
    spatial_window=(2, 2),
    spatiotemporal_window=(1, 2),
    positions=(2, 2, 2),
    text=TEXT,
    self_conditioning=True,
    low_resolution=True,
    attention="blockwise",
    remat="none",
    dtype="float32",
)
TRAINED = MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)
SAMPLED = MeshConfig(data=2, sequence=2, tensor=2)
same = functools.partial(assert_near, tolerance=1e-5, least=0.0, share=1e-2)


@pytest.fixture(scope="module")
def params(randomised):
    return jax.device_get(randomised(denoiser_specs(NETWORK), scale=0.15))


def trained(mesh, params, batch, **model):  # noqa: F811
    low_BLQ = np.random.default_rng(0).standard_normal((*batch["segments_BL"].shape, 2), np.float32)
    batch = batch | {"low_BLQ": low_BLQ}
    run = dataclasses.replace(RUN, model=dataclasses.replace(NETWORK, **model))
    return train(mesh, denoiser_specs(NETWORK), functools.partial(denoiser_loss, run), params, batch, Pack)


@pytest.fixture(scope="module")
def trained_on_one(params, batch):  # noqa: F811
    return trained(one_device(), params, batch, attention="dense")


def test_it_is_trained_as_on_one_device(params, batch, trained_on_one):  # noqa: F811
    """Weights, heads and tokens are split, and their windows meet round a ring."""
    found = trained(make_mesh(TRAINED), params, batch, sequence="ring")
    for what in trained_on_one:
        same(found[what], trained_on_one[what])


def sampled(mesh, params, **model):
    draw = np.random.default_rng(0).standard_normal
    low = lambda size: draw((size[0], size[1] // 2, size[2] // 2, 2), np.float32)  # noqa: E731
    requests = [dataclasses.replace(request, low=low(request.size)) for request in REQUESTS]
    run = dataclasses.replace(RUN, model=dataclasses.replace(NETWORK, **model))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(denoiser_specs(NETWORK), mesh))
        model = TrainedDenoiser(run, placed, Tokenizer(run.tokenizer), mesh)
        settings = SamplingConfig(steps="2", low_noise=0.2)
        return sample_latents(model, requests, settings, 5, Watch(lambda done, total: None))


def test_samples_are_those_of_one_device(params):
    """Guided, with a given frame and a ring, in parts: what branches keep is split as the tokens are."""
    same(sampled(make_mesh(SAMPLED), params, sequence="all_to_all"), sampled(one_device(), params, attention="dense"))
