"""An autoencoder that was stopped early is finished as it is, used, and trained further."""

import dataclasses
import shutil

import pytest
from fixtures_runs import PREVIEWS, TINY, chain, run, train_options  # noqa: F401

from sora_jax.config import load, read_json, to_dict
from sora_jax.errors import Stopped
from sora_jax.files import write_json
from sora_jax.kinds import run as runs
from sora_jax.kinds import run_config
from sora_jax.train.autoencoder import StageConfig
from sora_jax.train.frozen import load_autoencoder, missing_autoencoder
from sora_jax.train.loop import LoopConfig
from sora_jax.train.optim import OptimConfig


@pytest.fixture
def stopped(chain, tmp_path):  # noqa: F811
    """The run of the chain as it was at step 3 of 6."""
    folder = tmp_path / "run"
    shutil.copytree(chain.autoencoder, folder)
    for left in ("frozen", "checkpoints/6"):
        shutil.rmtree(folder / left)
    return folder


def test_a_stopped_autoencoder_is_finished_used_and_trained_further(chain, stopped, tmp_path, capsys):  # noqa: F811
    encode = ["data", "encode", f"--autoencoder={stopped}", f"--data={chain.dataset}", f"--out={tmp_path / 'latents'}"]
    capsys.readouterr()
    assert run(*encode) == 2
    assert capsys.readouterr().err.strip() == (
        f"sora-jax: --autoencoder is '{stopped}'; that autoencoder is at step 3 and its training has not ended: go on "
        f"with it, or use it as it is now by sora-jax train --workdir={stopped} --finish"
    )
    assert run("train", f"--workdir={stopped}", "--finish") == 0
    assert "at step 3; the ordinary command trains it further" in capsys.readouterr().out
    record = read_json(stopped / "frozen" / "autoencoder.json")
    assert record["steps"] == 3 and record["held_out_psnr"] > 0
    assert record["weights_digest"] == load_autoencoder(stopped).weights_digest
    assert run(*encode) == 0 and not (stopped / "checkpoints" / "6").exists()
    assert run(*train_options("autoencoder", stopped, f"data={chain.dataset}", *PREVIEWS)) == 0
    ended = read_json(stopped / "frozen" / "autoencoder.json")
    assert ended == read_json(chain.autoencoder / "frozen" / "autoencoder.json") and ended["steps"] == 6
    assert ended["fingerprint"] != record["fingerprint"]


def test_a_run_of_stages_is_finished_by_the_newest_one(chain, tmp_path, capsys):  # noqa: F811
    config = run_config(load(f"{TINY}:autoencoder", [f"data={chain.dataset}"]))
    stages = tuple(StageConfig(steps=9, optim=config.optim) for _ in range(2))
    staged = dataclasses.replace(config, loop=LoopConfig(), optim=OptimConfig(), stages=stages)
    folder = tmp_path / "run"
    folder.mkdir()
    write_json(folder / "config.json", to_dict(staged))
    assert missing_autoencoder(folder).endswith("that autoencoder has no checkpoint yet")
    shutil.copytree(chain.autoencoder, folder / "stage_1")
    shutil.rmtree(folder / "stage_1" / "frozen")
    assert "that autoencoder is at step 6 of stage_1 and its training has not ended" in missing_autoencoder(folder)
    assert run("train", f"--workdir={folder}", "--finish") == 0
    assert load_autoencoder(folder).fingerprint == load_autoencoder(chain.autoencoder).fingerprint
    assert read_json(folder / "stage_1" / "frozen" / "autoencoder.json")["steps"] == 6


def test_what_cannot_be_finished_is_refused(chain, tmp_path, capsys):  # noqa: F811
    capsys.readouterr()
    empty = train_options("autoencoder", tmp_path / "run", f"data={chain.dataset}")
    assert run(*empty, "--finish") == 2 and "it has no checkpoint yet" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    folder = tmp_path / "transformer"
    folder.mkdir()
    config = run_config(load(f"{TINY}:transformer", []))
    write_json(folder / "config.json", to_dict(config))
    assert run("train", f"--workdir={folder}", "--finish") == 2
    assert "there is nothing to finish, `sora-jax sample` takes any checkpoint" in capsys.readouterr().err
    assert "there is no trained autoencoder in that folder" in missing_autoencoder(folder)


@pytest.mark.parametrize("variant", ["autoencoder", "transformer"])
def test_a_stop_says_how_an_autoencoder_is_used(tmp_path, monkeypatch, variant):
    def stop(*_):
        raise Stopped(7)

    monkeypatch.setattr(runs, "_train", stop)
    with pytest.raises(Stopped) as stopped:
        runs.train(run_config(load(f"{TINY}:{variant}", [])), tmp_path / "run")
    hint = f"; to use it as it is now: sora-jax train --workdir={tmp_path / 'run'} --finish"
    goes_on = "stopped at step 7; everything is saved, the same command goes on from there"
    assert str(stopped.value) == goes_on + hint * (variant == "autoencoder") and stopped.value.step == 7
