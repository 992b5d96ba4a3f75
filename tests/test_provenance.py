"""Check what a run says of itself: run.json, the model card, and what Weights & Biases gets."""

import datetime
import importlib.util
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from fixtures_runs import ROOT, chain  # noqa: F401
from fixtures_toy import toy_job, train

from sora_jax import __version__, cli
from sora_jax.errors import Stopped, UserError
from sora_jax.files import write_json
from sora_jax.train import provenance, tracking
from sora_jax.train.card import CARD, card, write_card
from sora_jax.train.metrics import MetricsWriter
from sora_jax.train.provenance import read_starts


def test_each_start_is_recorded_with_its_steps_times_and_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sora-jax", "train", "--workdir=runs/a b"])
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    train(tmp_path, steps=4)
    monkeypatch.setattr(sys, "argv", ["/usr/lib/ipykernel_launcher.py", "-f", "/home/somebody/kernel.json"])
    train(tmp_path, steps=6)
    first, second = read_starts(tmp_path)
    assert (first["from"], first["to"], second["from"], second["to"]) == (0, 4, 4, 6)
    assert first["command"] == "sora-jax train '--workdir=runs/a b'" and second["command"] == ""
    times = [datetime.datetime.fromisoformat(each[name]) for each in (first, second) for name in ("start", "end")]
    assert before <= times[0] and times == sorted(times)
    assert first["sora_jax"] == __version__ and first["python"] == platform.python_version()
    assert first["jax"] == jax.__version__ and first["devices"].startswith(f"{len(jax.devices())} x ")
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["parameters"] == {"trained": 4, "fixed": 0} and about["kind"] == "toy"
    assert "somebody" not in json.dumps(about)


def test_the_commit_is_that_of_the_checkout():
    if (ROOT / ".git").exists():
        words = ["git", "-C", str(ROOT), "log", "-1", "--format=%H"]
        assert provenance.commit()["commit"] == subprocess.run(words, capture_output=True, text=True).stdout.strip()


def test_without_a_checkout_or_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    assert provenance.commit() == {}
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() == {}


def test_what_cannot_be_written_stops_no_run(tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("no space left")

    monkeypatch.setattr(provenance, "write_json", refuse)
    assert int(train(tmp_path / "run", steps=2).step) == 2
    monkeypatch.setattr(provenance, "environment", refuse)
    assert int(train(tmp_path / "other", steps=2).step) == 2
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text('{"starts": [{"fr')
    assert read_starts(tmp_path / "damaged") == []


def test_the_card_says_what_the_run_is_and_its_commands_are_right(chain, tmp_path):  # noqa: F811
    text = (chain.transformer / "README.md").read_text()
    assert text == card(chain.transformer)
    weights = json.loads((chain.transformer / "run.json").read_text())["parameters"]["trained"]
    rows = [json.loads(line) for line in (chain.transformer / "metrics.jsonl").read_text().splitlines()]
    for said in (
        f"{weights:,} trained",
        "5 train, 1 held-out",
        "6 of 6 steps",
        f"| loss | {rows[-1]['loss']:.4f} | 6 |",
    ):
        assert said in text, said
    config = json.loads((chain.transformer / "config.json").read_text()) | {"preview": {}}
    write_json(tmp_path / "config.json", config)  # as of own clips: no prompts in the config
    write_json(tmp_path / "seen.json", json.loads((chain.transformer / "seen.json").read_text()))
    words = "--prompt='a blue square moves down' --frames=5 --height=24 --width=16 --out=clip.mp4"
    assert f"sora-jax sample --workdir={tmp_path} {words}\n" in card(tmp_path)
    other = card(chain.transformer, "models/mine")
    assert str(chain.transformer) not in other and other.startswith("# mine\n")
    for folder in (chain.transformer, chain.autoencoder):
        text = card(folder)
        commands = re.search(r"```\n(.*?)```", text, re.DOTALL)[1].splitlines()
        assert len(commands) > 2
        for command in (each for each in commands if " export " not in each):
            cli.parsed(shlex.split(command)[1:])
        assert ("PSNR of the autoencoder" in text) and ("held_out/psnr" in text) == (folder == chain.autoencoder)


def test_a_readme_of_the_user_stays_and_an_older_card_does_not(tmp_path):
    train(tmp_path, steps=1)
    write_json(tmp_path / "config.json", {"loop": {"steps": 1}, "batch": 2})
    write_card(tmp_path)
    first = (tmp_path / CARD).read_text()
    assert "1 of 1 steps" in first
    write_json(tmp_path / "config.json", {"loop": {"steps": 9}, "batch": 2})
    write_card(tmp_path)
    assert "1 of 9 steps" in (tmp_path / CARD).read_text()
    (tmp_path / CARD).write_text("What I tried.\n")
    write_card(tmp_path)
    assert (tmp_path / CARD).read_text() == "What I tried.\n"


class Broken(types.ModuleType):
    """wandb, as it is when it cannot reach its server in the middle of a run."""

    sent: list = []

    class Settings:
        def __init__(self, **_):
            pass

    @staticmethod
    def init(**_):
        def log(values):
            Broken.sent.append(values)
            if values["step"] == 3:
                raise OSError("the network is down")

        return types.SimpleNamespace(log=log, define_metric=lambda *_, **__: None)


def test_a_tracker_that_fails_is_reported_and_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", Broken("wandb"))
    assert int(train(tmp_path, wandb="project", steps=5).step) == 5
    assert [values["step"] for values in Broken.sent] == [1, 2, 3] and Broken.sent[0]["loss"] > 0
    said = capsys.readouterr().err
    assert said.count("nothing more is sent to Weights & Biases: the network is down") == 1


def test_a_picture_that_cannot_be_sent_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", Broken("wandb"))  # it has no Image
    tracker = tracking.Wandb("project", tmp_path, {})
    writer = MetricsWriter(tmp_path, 0, tracker)
    writer.picture(1, "preview", np.zeros((4, 4, 3), np.uint8))
    writer.picture(2, "preview", np.zeros((4, 4, 3), np.uint8))
    assert capsys.readouterr().err.count("nothing more is sent to Weights & Biases: ") == 1


def test_a_project_without_the_package_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tracking.check_wandb("")
    with pytest.raises(UserError, match=r"^config.loop.wandb is 'p'; wandb is not installed: pip install wandb"):
        tracking.check_wandb("p")


def test_a_run_is_one_run_there_also_when_it_goes_on(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    at = {2: lambda: os.kill(os.getpid(), signal.SIGINT)}
    with pytest.raises(Stopped):
        train(tmp_path, toy_job(at), wandb="project", steps=4)
    train(tmp_path, wandb="project", steps=4)
    own = json.loads((tmp_path / "wandb.json").read_text())["id"]
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(own) for folder in folders)
    assert all(list(folder.glob("run-*.wandb")) for folder in folders)
    assert "Weights" not in capsys.readouterr().err  # no failure is reported
