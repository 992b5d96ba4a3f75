"""The scripts of experiments/launch, run with stand-ins for gcloud, xpk and srun that note what they are asked."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from sora_jax.cli import make_parser
from sora_jax.commands import run_config
from sora_jax.config import load

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "experiments" / "launch"
STAND_IN = """#!/bin/sh
for word in "$(basename "$0")" "$@"; do printf "%s\\0" "$word"; done >> "$ASKED"
printf "\\n\\0" >> "$ASKED"
"""
GIVEN = {
    "BUCKET": "gs://bucket",
    "PROJECT": "mine",
    "IMAGE": "image",
    "LATENTS": "gs://bucket/l",
    "WORKDIR": "gs://bucket/r",
}


@pytest.fixture
def asked(tmp_path):
    """What a script asks of the tools of others: asked(script, argument, NAME=value...) -> lists of words."""
    for name in ("gcloud", "xpk", "srun"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)

    def ask(script: str, *arguments: str, code: int = 0, **given: str) -> list[list[str]]:
        log = tmp_path / "asked"
        log.write_text("")
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(tmp_path), "ASKED": str(log), **GIVEN, **given}
        environment = {name: value for name, value in environment.items() if value}
        done = subprocess.run(["bash", LAUNCH / script, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return [words.split("\0")[:-1] for words in log.read_text().split("\n\0")[:-1]]

    return ask


def understood(command: str):
    """The config of a `sora-jax train` line, after the real parser has read it."""
    command = re.search(r"sora-jax (train .*?)(?: > |$)", command)[1]
    words = shlex.split(command.replace("gs://", "/"))  # what reads gs:// is an extra
    options, rest = make_parser().parse_known_args(words)
    assert options.distributed and str(options.workdir).startswith("/bucket/r")
    changes = [word.removeprefix("--config.") for word in rest]
    assert all(word.startswith("--config.") for word in rest)
    return run_config(load(str(ROOT / options.config), changes))


@pytest.mark.parametrize("slices", ["1", "2"])
def test_every_worker_of_a_tpu_gets_the_same_command(asked, slices):
    more = {"SLICES": slices, "ARGUMENTS": "--config.batch=64 --config.loop.save_every=100"}
    (words,) = asked("tpu.sh", "train", **more)
    assert words[0] == "gcloud" and "--worker=all" in words and ("--node=all" in words) == (slices == "2")
    config = understood(next(word for word in words if word.startswith("--command=")).removeprefix("--command="))
    assert (config.mesh.slice, config.batch, config.loop.save_every) == (int(slices), 64, 100)
    assert config.latents == "/bucket/l"


@pytest.mark.parametrize("kind, runtime", [
    ("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-128", "v2-alpha-tpuv5"), ("v6e-256", "v2-alpha-tpuv6e"),
])  # fmt: skip
def test_machines_are_asked_for_with_the_software_of_their_kind(asked, kind, runtime):
    (one,) = asked("tpu.sh", "create", TYPE=kind)
    assert one[1:5] == ["compute", "tpus", "tpu-vm", "create"] and f"--version={runtime}" in one and "--spot" not in one
    (two,) = asked("tpu.sh", "create", TYPE=kind, SLICES="2", SPOT="1")
    assert two[3] == "queued-resources" and {"--node-count=2", f"--runtime-version={runtime}", "--spot"} <= set(two)


def test_the_code_goes_up_once_and_is_installed_everywhere(asked):
    up, everywhere = asked("tpu.sh", "install", NAME="tested")
    assert up[1:3] == ["storage", "cp"] and up[-1] == "gs://bucket/code/tested.tar.gz"
    assert up[-1] in everywhere[-1] and ".[tpu,gcs]" in everywhere[-1] and "--worker=all" in everywhere


@pytest.mark.parametrize("verb", ["log", "stop", "delete"])
def test_a_run_is_watched_stopped_and_its_machines_given_back(asked, verb):
    for slices in ("1", "2"):
        assert len(asked("tpu.sh", verb, SLICES=slices)) == 1


def test_xpk_is_given_image_slices_and_command(asked):
    (made,) = asked("xpk.sh", "create", SLICES="2")
    assert made[1:3] == ["cluster", "create"] and "--num-slices=2" in made
    (words,) = asked("xpk.sh", "train", SLICES="2", CONFIG="configs/sora.py:14b")
    assert {"--docker-image=image", "--num-slices=2", "--project=mine"} <= set(words)
    config = understood(next(word for word in words if word.startswith("--command=")))
    assert config.mesh.slice == 2 and config.model.width == 4096
    assert all(len(asked("xpk.sh", verb)) == 1 for verb in ("list", "stop", "delete"))


def test_slurm_starts_a_process_a_gpu_with_nodes_as_slices(asked):
    (words,) = asked(
        "slurm.sbatch", SLURM_JOB_NUM_NODES="4", ARGUMENTS="--config.batch=128 --config.model.attention=cudnn"
    )
    config = understood(shlex.join(words))
    assert (config.mesh.slice, config.mesh.fsdp, config.mesh.data, config.batch) == (4, 8, 1, 128)
    options = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", (LAUNCH / "slurm.sbatch").read_text()))
    assert options["ntasks-per-node"] == options["gpus-per-node"] == str(config.mesh.fsdp)


def test_the_job_set_of_gke_uses_every_chip_of_its_slices():
    job = yaml.safe_load((LAUNCH / "gke.yaml").read_text())["spec"]["replicatedJobs"][0]
    inside = job["template"]["spec"]
    pod = inside["template"]["spec"]
    (container,) = pod["containers"]
    config = understood(shlex.join(container["command"]).replace("BUCKET", "bucket"))
    topology = [int(n) for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    hosts, chips = inside["parallelism"], container["resources"]["limits"]["google.com/tpu"]
    assert inside["completions"] == hosts and hosts * chips == topology[0] * topology[1]
    assert config.mesh.slice == job["replicas"]
    assert config.batch % (job["replicas"] * hosts * chips) == 0


@pytest.mark.parametrize("script, missing", [("tpu.sh", "BUCKET"), ("xpk.sh", "PROJECT"), ("slurm.sbatch", "LATENTS")])
def test_what_is_not_given_is_named(asked, script, missing):
    assert asked(script, "train", code=1, **{missing: ""}) == []


@pytest.mark.parametrize("script", ["tpu.sh", "xpk.sh"])
def test_an_unknown_verb_shows_how_it_is_used(asked, script):
    assert asked(script, "fly", code=2) == []
