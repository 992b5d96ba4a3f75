"""The scripts of experiments/launch, run with stand-ins for gcloud, xpk and srun that note what they are asked."""

import os
import re
import shlex
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from sora_jax.cli import make_parser
from sora_jax.config import load
from sora_jax.errors import LostPeer, UserError
from sora_jax.kinds import run_config

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "experiments" / "launch"
STAND_IN = """#!/bin/sh
case "$*" in *describe*) echo ACTIVE ;; "storage cp -"*) cat > "$ASKED.tar.gz" ;; esac
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
    for name in ("gcloud", "xpk", "srun", "scontrol"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)

    def ask(script: str, *arguments: str, code: int = 0, said: str = "", **given: str) -> list[list[str]]:
        log = tmp_path / "asked"
        log.write_text("")
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(tmp_path), "ASKED": str(log), **GIVEN, **given}
        environment = {name: value for name, value in environment.items() if value}
        done = subprocess.run(["bash", LAUNCH / script, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == code and said in done.stdout + done.stderr, done.stderr
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


def option(words: list[str], name: str) -> str:
    return next(word for word in words if word.startswith(f"--{name}=")).removeprefix(f"--{name}=")


@pytest.mark.parametrize("slices", ["1", "2"])
def test_every_worker_of_a_tpu_gets_the_same_command(asked, slices):
    more = {"SLICES": slices, "ARGUMENTS": "--config.batch=64 --config.loop.save_every=100"}
    (words,) = asked("tpu.sh", "train", **more)
    assert words[0] == "gcloud" and "--worker=all" in words and ("--node=all" in words) == (slices == "2")
    config = understood(option(words, "command"))
    assert (config.batch, config.loop.save_every, config.latents) == (64, 100, "/bucket/l")


def test_a_worker_starts_the_run_in_the_background_and_stop_ends_it_alone(asked, tmp_path):
    """The commands of `train` and `stop` as a worker's shell would run them, with a run that lasts a minute."""
    fake = tmp_path / "sora_jax" / ".venv" / "bin" / "sora-jax"
    fake.parent.mkdir(parents=True)
    fake.write_text('#!/bin/sh\ntrap "echo saved; exit 130" TERM\necho $$ > pid\nsleep 60 & wait\n')
    fake.chmod(0o755)
    begun = time.monotonic()

    def remote(verb):  # ssh waits until nobody holds the output of the command any more
        line = option(asked("tpu.sh", verb)[0], "command")
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr

    def when(there):
        while not there():
            assert time.monotonic() - begun < 50
            time.sleep(0.02)

    remote("train")
    when((tmp_path / "sora_jax" / "pid").exists)
    remote("stop")
    when(lambda: "saved" in (tmp_path / "sora_jax" / "train.log").read_text())


@pytest.mark.parametrize("kind, runtime", [
    ("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-128", "v2-alpha-tpuv5"), ("v6e-256", "v2-alpha-tpuv6e"),
])  # fmt: skip
def test_machines_are_asked_for_with_the_software_of_their_kind(asked, kind, runtime):
    (one,) = asked("tpu.sh", "create", TYPE=kind)
    assert one[1:5] == ["compute", "tpus", "tpu-vm", "create"] and f"--version={runtime}" in one and "--spot" not in one
    two, waited = asked("tpu.sh", "create", TYPE=kind, SLICES="2", SPOT="1")
    assert two[3] == "queued-resources" and {"--node-count=2", f"--runtime-version={runtime}", "--spot"} <= set(two)
    assert waited[3:6] == ["queued-resources", "describe", "sora"]


def test_all_of_the_package_goes_up_once_and_is_installed_everywhere(asked, tmp_path):
    up, everywhere = asked("tpu.sh", "install", NAME="tested")
    assert up[1:] == ["storage", "cp", "-", "gs://bucket/code/tested.tar.gz"]
    with tarfile.open(tmp_path / "asked.tar.gz") as sent:
        names = set(sent.getnames())
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "sora_jax").rglob("*.py")} <= names
    assert {"setup.cfg", "configs/sora.py"} <= names and not any(name.startswith((".git/", "runs/")) for name in names)
    assert up[-1] in everywhere[-1] and ".[tpu,gcs]" in everywhere[-1] and "--worker=all" in everywhere


def test_what_is_paid_for_is_given_back(asked):
    assert asked("tpu.sh", "delete")[0][1:6] == ["compute", "tpus", "tpu-vm", "delete", "sora"]
    assert asked("tpu.sh", "delete", SLICES="2")[0][1:6] == ["compute", "tpus", "queued-resources", "delete", "sora"]
    assert asked("xpk.sh", "delete")[0][1:4] == ["cluster", "delete", "--cluster=sora"]


def test_the_log_is_that_of_the_worker_that_writes(asked):
    for slices, vm in (("1", "sora"), ("2", "sora-0")):
        (words,) = asked("tpu.sh", "log", SLICES=slices)
        assert words[5] == vm and "--worker=0" in words and "train.log" in option(words, "command")


def test_xpk_is_given_image_slices_capacity_and_command(asked):
    (made,) = asked("xpk.sh", "create", SLICES="2", CAPACITY="--spot")
    assert made[1:3] == ["cluster", "create"] and {"--num-slices=2", "--spot"} <= set(made)
    (words,) = asked("xpk.sh", "train", SLICES="2", CONFIG="configs/sora.py:14b")
    assert {"--docker-image=image", "--num-slices=2", "--project=mine"} <= set(words)
    assert int(option(words, "restart-on-exit-codes")) == LostPeer.code
    assert understood(option(words, "command")).model.width == 4096
    for verb, second in (("list", "list"), ("stop", "delete")):
        assert asked("xpk.sh", verb)[0][1:3] == ["workload", second]


def test_slurm_starts_a_process_a_gpu_with_nodes_as_slices(asked):
    more = "--config.batch=128 --config.model.attention=cudnn"
    (words,) = asked("slurm.sbatch", SLURM_JOB_NUM_NODES="4", SLURM_CPUS_PER_TASK="12", ARGUMENTS=more)
    assert words[1] == "--cpus-per-task=12"
    config = understood(shlex.join(words))
    assert (config.mesh.slice, config.mesh.fsdp, config.mesh.data, config.batch) == (4, 8, 1, 128)
    options = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", (LAUNCH / "slurm.sbatch").read_text()))
    assert options["ntasks-per-node"] == options["gpus-per-node"] == str(config.mesh.fsdp)


@pytest.mark.parametrize("code, again", [(2, False), (LostPeer.code, True), (130, True), (134, True)])
def test_slurm_queues_the_job_again_where_that_helps(asked, tmp_path, code, again):
    (tmp_path / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
    found = asked("slurm.sbatch", code=code, SLURM_JOB_ID="7")
    assert found == ([["scontrol", "requeue", "7"]] if again else [])


def test_the_job_set_of_gke_uses_every_chip_of_its_slices():
    job = yaml.safe_load((LAUNCH / "gke.yaml").read_text())["spec"]["replicatedJobs"][0]
    inside = job["template"]["spec"]
    pod = inside["template"]["spec"]
    (container,) = pod["containers"]
    config = understood(shlex.join(container["command"]).replace("BUCKET", "bucket"))
    topology = [int(n) for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    hosts, chips = inside["parallelism"], container["resources"]["limits"]["google.com/tpu"]
    assert UserError.code in inside["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert LostPeer.code not in inside["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert inside["completions"] == hosts and hosts * chips == topology[0] * topology[1]
    assert config.batch % (job["replicas"] * hosts * chips) == 0


@pytest.mark.parametrize("script, missing", [("tpu.sh", "BUCKET"), ("xpk.sh", "PROJECT"), ("slurm.sbatch", "LATENTS")])
def test_what_is_not_given_is_named(asked, script, missing):
    assert asked(script, "train", code=1, said=f"{missing}: set {missing} to", **{missing: ""}) == []


@pytest.mark.parametrize("script", ["tpu.sh", "xpk.sh"])
def test_an_unknown_verb_shows_how_it_is_used(asked, script):
    assert asked(script, "fly", code=2, said=f"experiments/launch/{script} create") == []
