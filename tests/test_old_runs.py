"""Runs, caches and autoencoders of version 0.1.0 (commit b579176) open, go on and sample as they did there.

tests/data/runs_0_1_0.tar.xz was made by that commit: `tiny.py`, its configs/tiny.py; a dataset of six clips; an
autoencoder run and a denoiser run of two steps; a latent cache. `expected` has the reports of both runs when that
commit went on to step 4, `sampled.npz` two clips that it sampled, and `processor.txt` the processor they were computed
on: there, and compiled as by a user (`XLA_FLAGS= pytest`), the numbers must agree to the bit; elsewhere to rounding, as
other processors run other instructions.
"""

import contextlib
import json
import os
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import processor_digest
from fixtures_runs import one_device, run

from sora_jax.data.feeding import pipeline
from sora_jax.data.storing.latents import LatentCache
from sora_jax.diffusion.keys import step_key
from sora_jax.generate.run import load_run
from sora_jax.parallel.rules import layout_of
from sora_jax.train import autoencoder, reconstruction
from sora_jax.train.frozen import load_autoencoder
from sora_jax.train.metrics import read_metrics

DATA = Path(__file__).parent / "data" / "runs_0_1_0.tar.xz"
SAME = ["batch=4", "optim.ema=(0.9,)", "loop.keep=1", "loop.steps=4"]
CHANGES = {  # of the config file, as the runs were started
    "autoencoder": ["data=dataset", "crop=(5,8,8)", "model.width=4", "model.multipliers=(1,)", "model.patch=(4,4)"]
    + ["model.kernels=((1,3,3),(1,1,1))"],
    "transformer": ["latents=latents", "model.width=16", "model.text.width=16", "tokenizer.vocab=48", "model.depth=1"],
}


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """The folder of old runs; what the tests change in it only makes runs longer."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(DATA) as archive:
        archive.extractall(folder, filter="data")
    return folder


def agree(found, expected, old: Path, tolerance: float = 1e-4) -> None:
    """To the bit on the processor that made the numbers, compiled as then (`.ci/run` does so); else to rounding."""
    same = (old / "expected" / "processor.txt").read_text() == processor_digest() and not os.environ["XLA_FLAGS"]
    np.testing.assert_allclose(found, expected, rtol=0 if same else 1e-3, atol=0 if same else tolerance)


def test_an_autoencoder_opens_by_its_old_fingerprint(old):
    record = json.loads((old / "autoencoder" / "frozen" / "autoencoder.json").read_text())
    assert "name" not in record["config"] and "version" not in record
    found = load_autoencoder(old / "autoencoder")
    assert found.fingerprint == record["fingerprint"] and found.config.name == "causal"


def test_a_cache_belongs_to_its_old_autoencoder(old):
    LatentCache(old / "latents").check(load_autoencoder(old / "autoencoder").fingerprint)
    with contextlib.chdir(old):
        assert run("data", "encode", "--autoencoder=autoencoder", "--data=dataset", "--out=latents") == 0


def test_clips_are_sampled_to_the_bit(old):
    with one_device():
        model = load_run(old / "transformer")
        prompts, sizes = ["a red square moves right", "a green square"], [(5, 16, 24), (1, 16, 16)]
        clips = model.generate(prompts, sizes, steps=2)
    with np.load(old / "sampled.npz") as expected:
        for number, clip in enumerate(clips):
            agree(clip / 255.0, expected[f"arr_{number}"] / 255.0, old, 1.01 / 255)


def draw_as_then(patch) -> None:
    """Give copies of a clip in a step the draws of the first, and key an autoencoder's noise by the batch."""
    patch.setattr(pipeline, "_numbered", lambda ids: np.zeros(len(ids), np.uint32))
    patch.setattr(autoencoder, "step_key", lambda *names: jax.random.fold_in(step_key(*names), 0))

    def draw(config, mean, logvar, keys, aids):
        eps = jax.random.normal(keys.key, mean.shape, out_sharding=layout_of(mean))
        return mean + jnp.exp(0.5 * logvar) * eps

    patch.setattr(reconstruction, "_draw", draw)


@pytest.mark.parametrize("variant, reports", [("transformer", "denoiser"), ("autoencoder", "autoencoder")])
def test_a_run_goes_on_with_its_old_config_file(old, variant, reports, capfd, monkeypatch):
    draw_as_then(monkeypatch)
    changes = [f"--config.{change}" for change in CHANGES[variant] + SAME]
    with contextlib.chdir(old):
        assert run("train", f"--config=tiny.py:{variant}", f"--workdir={variant}", *changes) == 0
    assert "sora_jax.config.mutable is called to_config_dict now" in capfd.readouterr().err
    rows = [json.loads(line) for line in (old / "expected" / f"{reports}.jsonl").read_text().splitlines()]
    found = read_metrics(old / variant)
    assert [row["step"] for row in found] == [row["step"] for row in rows] == [1, 2, 3, 4]
    for row, expected in zip(found, rows, strict=True):
        kept = {name: value for name, value in expected.items() if "second" not in name}
        added = ("learning_rate", "held_out/")
        assert kept.keys() == {name for name in row if "second" not in name and not name.startswith(added)}
        for name, value in kept.items():
            agree(np.nan if row[name] is None else row[name], np.nan if value is None else value, old)
