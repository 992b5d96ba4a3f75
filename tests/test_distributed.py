"""Two processes: one run, its checkpoints, its stops, and the death of one of them."""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from fixtures_runs import chain, train_options  # noqa: F401
from fixtures_toy import kill, one_of_two, train, train_half  # noqa: F401
from PIL import Image

from sora_jax import cli
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.errors import LostPeer, UserError
from sora_jax.parallel import distributed
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.train.frozen import load_autoencoder

HEARTBEAT_TIMEOUT = 6  # seconds, instead of a minute
PATIENCE = 200


def begin_two(kill, workdir, devices, function, *arguments, **options):  # noqa: F811
    """The processes; what they say goes to 0.log and 1.log beside the run."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    call = functools.partial(one_of_two, **options)
    common = (port, HEARTBEAT_TIMEOUT, devices, function, *arguments)
    return [kill.start(workdir.parent / f"{i}.log", call, i, *common) for i in range(2)]


def end(workdir, processes) -> list[tuple[int, str]]:
    """Exit code of each, and what it has said since the last call."""
    ended = []
    for i, process in enumerate(processes):
        process.join(PATIENCE)
        log = workdir.parent / f"{i}.log"
        ended.append((process.exitcode, log.read_text()))
        log.unlink()
    return ended


def rows(workdir) -> dict[int, dict]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return {row["step"]: row for row in (json.loads(line) for line in lines if line.endswith("\n"))}


def wait_for(workdir, step: int, processes) -> None:
    give_up = time.monotonic() + PATIENCE
    while max(rows(workdir), default=0) < step:
        assert time.monotonic() < give_up and all(process.is_alive() for process in processes)
        time.sleep(0.01)


def same(first: dict, second: dict, *names: str) -> None:
    assert list(first) == list(second)
    for name in names:
        np.testing.assert_allclose([r[name] for r in first.values()], [r[name] for r in second.values()], rtol=2e-5)


def test_a_stop_and_a_death_in_two_processes_leave_the_run_of_one(kill, tmp_path):  # noqa: F811
    workdir, options = tmp_path / "run", dict(steps=200, save_every=10)
    begin = functools.partial(begin_two, kill, workdir, 1, train_half, workdir, **options)

    processes = begin()
    wait_for(workdir, 15, processes)
    os.kill(processes[1].pid, signal.SIGTERM)  # one is told, both stop after the same step
    (code, first), (other, second) = end(workdir, processes)
    assert (code, other) == (130, 130), first + second
    steps = {re.search(r"stopped at step (\d+); everything is saved", text)[1] for text in (first, second)}
    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert steps == {str(newest)} and 15 <= newest < 200
    assert "toy: step" in first and "toy: step" not in second  # one of them speaks

    processes = begin()
    wait_for(workdir, newest + 15, processes)
    processes[1].kill()
    moment = time.monotonic()  # of the death
    (code, text), _ = end(workdir, processes)
    assert time.monotonic() - moment < 5 * HEARTBEAT_TIMEOUT
    # The connection breaks, or the last sign of life is too long ago, whichever is seen first.
    told = {75: "another process of this run has died", -signal.SIGABRT: "another task died"}
    assert told[code] in text

    (code, first), (other, second) = end(workdir, begin())
    assert (code, other) == (0, 0), first + second
    train(tmp_path / "alone", devices=2, **options)
    same(rows(workdir), rows(tmp_path / "alone"), "loss", "gradient_norm", "parameter_norm")
    last = rows(workdir)[200]
    np.testing.assert_allclose(last["tokens_per_second"] / last["clips_per_second"], 3, rtol=1e-6)
    assert last["padding_share"] == 1 / 4


def same_autoencoder(*runs) -> None:
    one, other = map(load_autoencoder, runs)
    for values in zip(*(jax.tree.leaves((a.params, a.mean_C, a.std_C)) for a in (one, other)), strict=True):
        np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-5)
    quality = [json.loads(Path(run, "frozen", "autoencoder.json").read_text())["held_out_psnr"] for run in runs]
    np.testing.assert_allclose(*quality, rtol=1e-3)
    for step in (1, 2):  # what was shown of it
        shown = [np.asarray(Image.open(Path(run, "samples", f"step_{step:06d}.png")), int) for run in runs]
        np.testing.assert_allclose(*shown, atol=1)


def commands(*each) -> int:
    """One after the other; the first exit code that is not 0."""
    return next(filter(None, map(cli.main, each)), 0)


def test_two_processes_train_as_one_does_and_one_goes_on_from_them(kill, chain, tmp_path, monkeypatch):  # noqa: F811
    def compress(workdir):
        changes = [f"data={chain.dataset}", "loop.steps=2", "loop.save_every=0", "loop.preview_every=1", "batch=2"]
        changes += ["image_share=0.0", "model.patch=(4,4)", "model.multipliers=(1,)", "model.width=4", "feed.threads=0"]
        return list(map(str, train_options("autoencoder", f"{workdir}-autoencoder", *changes)))

    def command(workdir, steps=4):
        loop = [f"loop.steps={steps}", "loop.save_every=2", "mesh.fsdp=2", "model.depth=1", "feed.threads=0"]
        return list(map(str, train_options("transformer", workdir, f"latents={chain.latents}", *loop)))

    together, alone = tmp_path / "run", tmp_path / "alone"
    processes = begin_two(kill, together, 1, commands, compress(together), command(together))
    (code, first), (other, second) = end(together, processes)
    assert (code, other) == (0, 0), first + second
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    assert commands(compress(alone), command(alone)) == 0
    same_autoencoder(f"{together}-autoencoder", f"{alone}-autoencoder")
    same(rows(together), rows(alone), "loss", "gradient_norm", "parameter_norm")
    for workdir in (together, alone):  # another number of processes
        assert cli.main(command(workdir, 5)) == 0
    same(rows(together), rows(alone), "loss", "gradient_norm", "parameter_norm")


def test_a_coordinator_that_is_not_there_is_named():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        name = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(LostPeer, match=f"--coordinator is '{name}'; nobody answers there"):
        distributed._wait_for(name, deadline=time.monotonic() + 0.1)
    with pytest.raises(UserError, match="--coordinator is 'no.such.host.invalid:1'; nobody answers there") as mistake:
        distributed._wait_for("no.such.host.invalid:1", deadline=0.0)
    assert mistake.value.code == 2


def test_processes_that_do_not_come_are_told_and_given_up():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        name = f"127.0.0.1:{free.getsockname()[1]}"
    code = f"from sora_jax.parallel import distributed as d; d.START_TIMEOUT = 4; d.start({name!r}, 2, 0)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 75
    assert f"sora-jax: waiting for all of 2 processes at {name}, 4 s at most" in ended.stderr
    assert f"sora-jax: all of 2 processes at {name} were not there within 4 s" in ended.stderr


def test_the_share_of_one_process_is_the_whole_batch():
    for config in (MeshConfig(), MeshConfig(fsdp=2, tensor=2), MeshConfig(data=1, tensor=8)):
        assert distributed.share_of_batch(make_mesh(config)) == ShardSpec()


@pytest.mark.parametrize(
    "given, message",
    [
        (("host:1", None, None), "--processes, --process is not given"),
        (("host:1", 2, 2), "--process is 2; it must be from 0 to 1"),
        (("host", 2, 1), "--coordinator is 'host'; it must be HOST:PORT"),
        (("host:x", 2, 1), "--coordinator is 'host:x'; it must be HOST:PORT"),
        (("host:65536", 2, 1), "--coordinator is 'host:65536'; it must be HOST:PORT, the port from 1 to 65535"),
    ],
)
def test_options_that_say_no_place_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        distributed.start(*given)
