"""Every network behind the front by the same commands: trained, continued, planned, sampled for every task.

A new network is one line in NETWORKS. The transformer's own tests are elsewhere.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from fixtures_runs import TINY, chain, one_device, run, with_random_weights  # noqa: F401

from sora_jax.data.reading.media import decode
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.generate.run import load_run
from sora_jax.generate.tasks import Tasks
from sora_jax.kinds import run_config
from sora_jax.models.denoiser import denoiser_specs
from sora_jax.nn.params import count
from sora_jax.parallel.mesh import make_mesh
from sora_jax.plan import report
from sora_jax.train.metrics import read_metrics

SHARED = "latent_channels=4, text=base.model.text, remat='none'"  # the chain's channels, the text of configs/tiny.py
NETWORKS = {  # name: its import, and a tiny one
    "crate": (
        "from sora_jax.models.crate import CrateConfig",
        f"CrateConfig(depth=2, width=24, heads=2, {SHARED})",
    ),
    "walt": (
        "from sora_jax.models.walt_blocks import WaltConfig",
        f"WaltConfig(depth=2, width=24, heads=2, patch=(1, 2, 2), spatial_window=(2, 2), "
        f"spatiotemporal_window=(1, 2), self_conditioning=True, {SHARED})",
    ),
    "unet": (
        "from sora_jax.models.unet_layers import UNetConfig",
        f"UNetConfig(width=8, multipliers=(1, 1), blocks=1, attended=(1,), head_width=8, patch=(1, 2, 2), {SHARED})",
    ),
}
SHORT = ["--config.loop.steps=4", "--config.loop.save_every=2", "--config.loop.log_every=1"]
SIZE = (9, 16, 24)
NEW_SIZE = (5, 24, 24)  # that no clip has
SETTINGS = SamplingConfig(steps="2")


def write_config(path, network: str) -> str:
    """A config file that differs from configs/tiny.py in its network alone."""
    head, model = NETWORKS[network]
    lines = [
        "import dataclasses",
        "from sora_jax.config import load, to_config_dict",
        "from sora_jax.kinds import run_config",
        head,
        "def get_config(variant=''):",
        f"    base = run_config(load({str(TINY)!r} + ':transformer'))",
        f"    return to_config_dict(dataclasses.replace(base, model={model}))",
    ]
    path.write_text("\n".join(lines))
    return f"--config={path}"


@pytest.fixture(scope="module", params=NETWORKS)
def finished(request, chain, tmp_path_factory):  # noqa: F811
    """The name of a network, the options of its training, and the folder of a finished run."""
    folder = tmp_path_factory.mktemp(request.param)
    config = write_config(folder / "config.py", request.param)
    options = ["train", config, f"--config.latents={chain.latents}", *SHORT]
    assert run(*options, f"--workdir={folder / 'run'}") == 0
    return request.param, options, folder / "run"


@pytest.fixture(scope="module")
def model(finished):
    """The run with random weights added, so that no gate is closed."""
    with one_device():
        return with_random_weights(load_run(finished[2]))


CLIP = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
RED, BLUE = "a red square moves right", "a blue square"


@pytest.fixture(scope="module")
def made(model):
    """Every task in one call, first a continuation; last three loops of one noise: red, blue, blue with guidance."""
    tasks, mask = Tasks(model), np.zeros((1, *SIZE[1:]), bool)
    mask[:, :8, :8] = True
    wanted = [
        tasks.extend(CLIP, 4),
        tasks.extend(CLIP, -5),
        tasks.animate(CLIP[:1], 9),
        tasks.connect(CLIP, CLIP, 4),
        tasks.close(CLIP, 4),
        tasks.fill(CLIP, mask),
        tasks.edit(CLIP, 0.5),
        *[tasks.loop((8, 16, 24))] * 3,
    ]
    settings = {"guidance": [2.0] * 7 + [1.0, 1.0, 4.0], "clip_ids": [*range(1, 8), 8, 8, 8], "tasks": wanted}
    return model.generate([RED] * 8 + [BLUE] * 2, sampling=SETTINGS, seed=3, **settings)


def test_it_is_trained_and_kept_by_its_name(finished):
    name, _, folder = finished
    kept = json.loads((folder / "config.json").read_text())
    assert kept["kind"] == "denoiser" and kept["model"]["name"] == name == run_config(kept).model.name
    losses = [row["loss"] for row in read_metrics(folder)]
    assert len(losses) == 4 and np.isfinite(losses).all() and len(set(losses)) == 4


def test_it_goes_on_to_the_bit(finished, tmp_path):
    """As if the run had been killed before its last checkpoint."""
    _, options, straight = finished
    stopped = shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(stopped / "checkpoints" / "4")
    (stopped / "metrics.jsonl").unlink()
    assert run(*options, f"--workdir={stopped}") == 0
    found, wanted = (
        [(r["step"], r["loss"], r["parameter_norm"]) for r in read_metrics(f)] for f in (stopped, straight)
    )
    assert found == wanted[2:]


@pytest.mark.parametrize("what, topology, chips", [("train", "v5e:1x1", 1), ("sample", "v5e:2x2", 4)])
def test_it_is_planned(finished, monkeypatch, capsys, what, topology, chips):
    """Compiled for CPU devices in place of chips; the tests of each network train it on several."""
    _, options, folder = finished
    monkeypatch.setattr(report, "topology_mesh", lambda config, _: make_mesh(config, jax.devices("cpu")[:chips]))
    plan = ["plan", *options[1:], f"--what={what}", "--config.sampling.steps=2", f"--topology={topology}", "--json"]
    assert run(*plan) == 0
    found = json.loads(capsys.readouterr().out)
    config = run_config(json.loads((folder / "config.json").read_text()))
    assert found["fits"] and found["flops"] > 0
    assert found["parameters"] == count(denoiser_specs(config.model))


def test_the_command_samples_a_size_that_no_clip_has(finished, tmp_path):
    frames, height, width = NEW_SIZE
    size = [f"--frames={frames}", f"--height={height}", f"--width={width}", "--steps=2", "--upscale=1"]
    sample = ["sample", f"--workdir={finished[2]}", "--prompt=a red square", *size]
    assert run(*sample, f"--out={tmp_path / 'clip.gif'}") == 0
    assert decode(tmp_path / "clip.gif").frames.shape == (*NEW_SIZE, 3)


def test_it_does_every_task(model, made):
    """Lengths are those asked for, what is given is kept, and a task alone gives what it gives among the others."""
    assert [len(frames) for frames in made] == [13, 14, 9, 22, 12, 9, 9, 8, 8, 8]
    assert all(frames.std() > 0 for frames in made)
    kept = next(iter(model.autoencoder.decode(model.autoencoder.encode([CLIP], 1), 1)))
    near(made[0][:9], kept)
    alone = model.generate(RED, sampling=SETTINGS, seed=3, guidance=2.0, tasks=[Tasks(model).extend(CLIP, 4)])
    near(alone, made[0])


def near(found, wanted):
    """Equal but for rounding to uint8 after float error."""
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1


def test_captions_and_guidance_change_the_sample(made):
    red, blue, guided = (frames.astype(int) for frames in made[-3:])
    assert np.abs(red - blue).max() > 2 and np.abs(blue - guided).max() > 2
