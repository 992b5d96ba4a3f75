"""W.A.L.T by the commands of every network: trained, resumed to the bit, sampled and planned by one config line."""

import numpy as np
import pytest
from fixtures_runs import chain, run  # noqa: F401
from test_systems import SHORT, planned, same_runs, write_config  # noqa: F401

from sora_jax.data.reading.media import decode
from sora_jax.train.metrics import read_metrics

MODEL = "WaltConfig(depth=2, width=16, heads=2, patch=(1, 2, 2), latent_channels=4, spatial_window=(2, 2),"
MODEL += " spatiotemporal_window=(1, 2), text=None, self_conditioning=True, remat='none')"
PACKING = "PackingConfig(length=48, slots=4)"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    lines = ["from sora_jax.models.walt_blocks import WaltConfig", "from sora_jax.train.denoiser import DenoiserRun"]
    lines += ["from sora_jax.data.packing.packs import PackingConfig"]
    path = tmp_path_factory.mktemp("walt") / "walt.py"
    return write_config(path, *lines, f"DenoiserRun(model={MODEL}, packing={PACKING})")


@pytest.fixture(scope="module")
def straight(config, chain, tmp_path_factory):  # noqa: F811
    """The folder of a finished run of four steps."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert run("train", config, f"--workdir={folder}", f"--config.latents={chain.latents}", *SHORT) == 0
    return folder


def test_it_goes_on_to_the_bit(config, straight, chain, tmp_path):  # noqa: F811
    train = ["train", config, f"--workdir={tmp_path / 'run'}", f"--config.latents={chain.latents}", *SHORT]
    assert run(*train, "--config.loop.steps=2") == 0
    assert run(*train) == 0
    same_runs(tmp_path / "run", straight)
    assert all(np.isfinite(row["loss"]) for row in read_metrics(straight))


def test_it_is_sampled(straight, tmp_path):
    out = tmp_path / "clip.gif"
    sizes = ["--frames=5", "--height=16", "--width=24", "--steps=2", "--upscale=1", "--guidance=1"]
    assert run("sample", f"--workdir={straight}", *sizes, f"--out={out}") == 0
    assert decode(out).frames.shape == (5, 16, 24, 3)


@pytest.mark.parametrize("what", ["train", "sample"])
def test_it_is_planned(config, planned, what):  # noqa: F811
    found = planned(config, f"--what={what}", "--config.batch=8", "--config.sampling.steps=2")
    assert found["fits"] and found["flops"] > 0
