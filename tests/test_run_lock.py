"""One process trains in a run folder at a time; what a process leaves that was killed holds nobody up."""

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from fixtures_bucket import bucket  # noqa: F401
from fixtures_runs import ROOT, TINY, chain, one_device, run, train_options  # noqa: F401

from sora_jax.config import load
from sora_jax.errors import UserError
from sora_jax.files import RUN_LOCK, as_path, is_empty
from sora_jax.kinds import run as runs
from sora_jax.kinds import run_config
from sora_jax.parallel import distributed
from sora_jax.train import run_lock as module
from sora_jax.train.autoencoder import StageConfig
from sora_jax.train.loop import LoopConfig
from sora_jax.train.optim import OptimConfig
from sora_jax.train.run_lock import Holder, run_lock

HOLD = """
import sys, time
from pathlib import Path
from sora_jax.train.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder `tmp_path / "run"`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}) as p:
        assert p.stdout.readline() == "held\n"
        yield p
        p.kill()


def refused(folder):
    return pytest.raises(UserError, match=f"^--workdir is {re.escape(repr(str(folder)))}; process")


def test_the_second_is_refused_by_name_and_a_killed_one_holds_nobody_up(chain, tmp_path, holder, capsys):  # noqa: F811
    folder = tmp_path / "run"
    options = train_options("transformer", folder, f"latents={chain.latents}")
    capsys.readouterr()
    assert run(*options) == 2
    said = capsys.readouterr().err
    wanted = rf"^sora-jax: --workdir is '{folder}'; process {holder.pid} on host {socket.gethostname()} has trained "
    wanted += r"in it since \d{4}-\d\d-\d\d \d\d:\d\d; wait for it, stop it, or take another folder$"
    assert re.search(wanted, said, re.M)
    assert is_empty(folder)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    start = time.monotonic()
    with run_lock(folder):
        assert f"process {os.getpid()}" in str(module._read(folder / RUN_LOCK))
    assert time.monotonic() - start < 5  # nobody is waited for
    assert f"was left by process {holder.pid}" in capsys.readouterr().err
    assert not (folder / RUN_LOCK).exists()


def test_training_holds_its_folder_and_those_of_its_stages(chain, tmp_path, monkeypatch):  # noqa: F811
    seen = []

    def fit(job, config, seed, mesh, workdir, *_):
        seen.append(workdir)
        for folder in (workdir, tmp_path / "run"):
            with refused(folder), run_lock(folder):
                pass
        raise UserError("enough")

    monkeypatch.setattr(runs, "fit", fit)
    config = run_config(load(f"{TINY}:autoencoder", [f"data={chain.dataset}"]))
    staged = dataclasses.replace(config, loop=LoopConfig(), optim=OptimConfig(), stages=(StageConfig(steps=2),))
    for each in (config, staged):
        with pytest.raises(UserError, match="enough"), one_device():
            runs.train(each, tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
    assert seen == [tmp_path / "run", tmp_path / "run" / "stage_1"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.05)
    monkeypatch.setattr(module, "WATCH", 0.5)


@pytest.fixture
def no_locks(monkeypatch):
    def locked(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module, "locked", locked)


def test_without_locks_a_sign_of_life_decides(tmp_path, quick, no_locks, capsys):
    with run_lock(tmp_path), refused(tmp_path), run_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / RUN_LOCK).write_text(module._text(Holder(7, socket.gethostname(), "long ago")))
    with run_lock(tmp_path):
        assert "was left by process 7" in capsys.readouterr().err


def test_so_it_does_in_a_bucket(bucket, quick):  # noqa: F811
    folder = as_path("gs://bucket/run")
    with run_lock(folder):
        assert is_empty(folder)
        with refused(folder), run_lock(folder):
            pass
    assert not (folder / RUN_LOCK).exists()


@pytest.mark.parametrize("lives", [True, False])
def test_a_process_of_another_machine_is_watched(tmp_path, quick, lives):
    """Its lock is not seen here where the network file system keeps locks to each machine."""
    path, ended = tmp_path / RUN_LOCK, threading.Event()

    def beat():
        number = 0
        while not ended.wait(0.05):
            number += lives
            path.write_text(module._text(Holder(7, "elsewhere", "10:32", number)))

    path.write_text(module._text(Holder(7, "elsewhere", "10:32")))
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with refused(tmp_path) if lives else contextlib.nullcontext(), run_lock(tmp_path):
            pass
    finally:
        ended.set()
        thread.join()


def test_who_waits_for_a_lock_that_is_removed_meanwhile_takes_the_new_one(tmp_path, monkeypatch):
    real, removed = module.locked, []

    def locked(path, wait):
        file = real(path, wait)
        if not removed:
            removed.append(path.unlink())
        return file

    monkeypatch.setattr(module, "locked", locked)
    with run_lock(tmp_path), refused(tmp_path), run_lock(tmp_path):
        pass
    assert removed


def test_what_is_refused_leaves_the_folder_as_it_was(tmp_path):
    for folder in (tmp_path / "a" / "b", tmp_path):
        with contextlib.suppress(KeyboardInterrupt), run_lock(folder):
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        (tmp_path / "file").touch()
        with run_lock(tmp_path / "file" / "run"):
            pass


def test_all_processes_of_a_run_learn_that_the_first_was_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "first", lambda: False)
    monkeypatch.setattr(distributed, "all_true", lambda here: False)
    with pytest.raises(UserError, match="the first process says why"), run_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
