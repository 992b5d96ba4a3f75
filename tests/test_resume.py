"""Runs in processes of their own that are stopped, killed and short of disk end where an undisturbed run ends."""

import functools
import json
import resource
import signal
import time

import chex
import jax
import pytest
from fixtures_runs import chain, start, train_options  # noqa: F401
from fixtures_toy import GROUPS, kill, train_slowly  # noqa: F401

from sora_jax.kinds import kind_of, run_config
from sora_jax.parallel.mesh import make_mesh
from sora_jax.train.checkpoint import Checkpoints
from sora_jax.train.state import init_state, make_optimizers

STEPS = 150
REPORT = 3  # a report is a mean over steps: one that spans a stop must not show it
PATIENCE = 300  # seconds, for busy machines


def command(workdir, chain):  # noqa: F811
    loop = [f"loop.steps={STEPS}", "loop.save_every=40", f"loop.log_every={REPORT}"]
    return train_options("transformer", workdir, f"latents={chain.latents}", *loop)


def finish(process) -> tuple[int, str]:
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


def wait_for(workdir, step: int, process) -> None:
    """Returns when the run has reported this step."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        path = workdir / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") * REPORT >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.communicate(timeout=9)[1]}")


def losses(workdir) -> list[tuple]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["gradient_norm"], row["parameter_norm"]) for row in rows]


def final_state(workdir):
    config = run_config(json.loads((workdir / "config.json").read_text()))
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh), Checkpoints(workdir / "checkpoints") as checkpoints:
        assert checkpoints.latest() == STEPS
        groups = kind_of(config).groups(config)
        like = init_state(groups, make_optimizers(groups, STEPS), 0, mesh)
        return jax.device_get(checkpoints.restore(like)[0])


@pytest.fixture(scope="module")
def straight(chain, tmp_path_factory):  # noqa: F811
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    code, errors = finish(start(*command(workdir, chain)))
    assert code == 0, errors
    return workdir


def test_stopped_and_killed_runs_are_the_undisturbed_run_to_the_bit(chain, straight, tmp_path):  # noqa: F811
    workdir = tmp_path / "run"
    process = start(*command(workdir, chain))
    wait_for(workdir, 15, process)
    process.send_signal(signal.SIGINT)
    code, errors = finish(process)
    assert code == 130 and "everything is saved" in errors and "Traceback" not in errors
    stopped = losses(workdir)[-1][0]
    assert 15 <= stopped < STEPS

    process = start(*command(workdir, chain))
    wait_for(workdir, max(60, stopped + 1), process)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL

    code, errors = finish(start(*command(workdir, chain)))
    assert code == 0, errors
    assert [row[0] for row in losses(straight)] == list(range(REPORT, STEPS + 1, REPORT))
    assert losses(workdir) == losses(straight)
    chex.assert_trees_all_equal(final_state(workdir), final_state(straight))


def test_twenty_kills_at_any_moment_leave_the_undisturbed_run_to_the_bit(kill, tmp_path):  # noqa: F811
    def begin(workdir, steps=100):
        return kill.start(kill.log_of(workdir), functools.partial(train_slowly, workdir, steps=steps, save_every=3))

    kill.finish(lambda workdir: begin(workdir, steps=1), tmp_path / "first")  # imports and compiles for the others
    pace = kill.finish(begin, tmp_path / "straight")
    kills = list(kill.killed(begin, tmp_path / "killed", 20, pace))
    kill.finish(begin, tmp_path / "killed")
    assert len(kills) == 20
    assert any(one.saving for one in kills) and any(one.fresh for one in kills) and any(one.lost for one in kills)
    assert all(one.lost <= 2 * 3 for one in kills)  # the steps since a save, while the next one is being written
    mesh = make_mesh(devices=jax.devices()[:1])
    found = []
    for name in ("killed", "straight"):
        with jax.set_mesh(mesh), Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            assert checkpoints.latest() == 100
            found.append(
                jax.device_get(checkpoints.restore(init_state(GROUPS, make_optimizers(GROUPS, 1), 1, mesh))[0])
            )
    chex.assert_trees_all_equal(*found)
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")


def test_a_save_that_fails_ends_the_run_and_it_goes_on_when_there_is_room(chain, tmp_path):  # noqa: F811
    workdir = tmp_path / "run"
    room = (chain.latents / "frozen" / "weights.npz").stat().st_size + 2000  # a checkpoint is larger
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room))
    code, errors = finish(start(*command(workdir, chain), preexec_fn=limit))
    assert code == 2, errors
    # The library's own threads print more about it than this, and cannot be told not to.
    assert sum(line.startswith("sora-jax: a checkpoint could not be saved in ") for line in errors.splitlines()) == 1
    code, errors = finish(start(*command(workdir, chain), "--config.loop.steps=45"))
    assert code == 0, errors
    assert [row[0] for row in losses(workdir)] == list(range(REPORT, 46, REPORT))
