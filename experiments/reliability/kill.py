"""Kills a training process with SIGKILL at random moments, again and again; it must end where an undisturbed run ends.

    python experiments/reliability/kill.py --out=runs/kill --kills=200

It makes a small dataset of the embedded world, an autoencoder and latents (a minute), trains the `tiny` transformer
undisturbed, and then once more with kills. One line for each kill goes to OUT/kills.jsonl, a table to OUT/table.md.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from sora_jax import cli
from sora_jax.config import read_json
from sora_jax.kinds import kind_of, run_config
from sora_jax.parallel.mesh import make_mesh
from sora_jax.train.checkpoint import Checkpoints
from sora_jax.train.metrics import read_metrics
from sora_jax.train.state import init_state, make_optimizers

ROOT = Path(__file__).parents[2]
Begin = Callable[[Path], multiprocessing.Process]


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill: seconds after the start, the newest step reported and the newest complete checkpoint.

    saving: another checkpoint was being written. fresh: no step had been reported since the start.
    """

    after: float
    reached: int
    saved: int
    saving: bool
    fresh: bool

    @property
    def lost(self) -> int:
        return max(0, self.reached - self.saved)


def start(log: Path, function: Callable[..., int], *arguments):
    """`function` as a process of its own: forked from a server that has imported all of this and started no JAX."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Path(__file__).stem])
    process = context.Process(target=_run, args=(str(log), function, arguments))
    process.start()
    return process


def _run(log: str, function: Callable[..., int], arguments: tuple) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(function(*arguments))


def log_of(workdir: Path) -> Path:
    """Where what a run says is kept."""
    return workdir.with_suffix(".log")


@dataclasses.dataclass(frozen=True)
class Pace:
    """Of an undisturbed run: steps, seconds until the first report, and in all."""

    steps: int
    ready: float
    seconds: float

    @property
    def step(self) -> float:
        return (self.seconds - self.ready) / self.steps


def finish(begin: Begin, workdir: Path) -> Pace:
    """Trains to the end."""
    clock = time.monotonic()
    process, ready = begin(workdir), None
    while process.is_alive():
        if ready is None and reached(workdir):
            ready = time.monotonic() - clock
        time.sleep(0.005)
    assert process.exitcode == 0, log_of(workdir).read_text()[-2000:]
    seconds = time.monotonic() - clock
    return Pace(reached(workdir), ready or seconds, seconds)


def killed(begin: Begin, workdir: Path, kills: int, pace: Pace, seed: int = 0) -> Iterator[Kill]:
    """Trains with so many kills; yields each.

    One in three comes at any moment of the start, the others at any moment after any of the steps that follow, as
    many of them as leave room for all kills.
    """
    draw = random.Random(seed)
    for _ in range(kills):
        before, clock = read_metrics(workdir), time.monotonic()
        process = begin(workdir)
        if draw.random() < 1 / 3:
            process.join(draw.uniform(0, pace.ready))
        else:
            _wait_for_step(process, workdir, before, saves(workdir)[0] + draw.randint(1, pace.steps // kills - 1))
            process.join(draw.uniform(0, 2 * pace.step))
        assert process.exitcode is None, log_of(workdir).read_text()[-2000:]
        after = time.monotonic() - clock
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        rows = read_metrics(workdir)
        yield Kill(after, reached(workdir), *saves(workdir), not rows or rows[-1] in before)


def _wait_for_step(process, workdir: Path, before: list[dict], step: int) -> None:
    """Returns when the process has made this step; one made again has other times in its row."""
    while process.exitcode is None:
        rows = read_metrics(workdir)  # read once: a run that goes on cuts away the rows after its checkpoint
        if rows and rows[-1]["step"] >= step and rows[-1] not in before:
            return
        process.join(0.002)


def reached(workdir: Path) -> int:
    """The newest step that was reported."""
    return max((row["step"] for row in read_metrics(workdir)), default=0)


def saves(workdir: Path) -> tuple[int, bool]:
    """The newest complete checkpoint, and whether another was being written."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0), any("-tmp" in name for name in names)


def final_state(workdir: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint, by their paths."""
    config = run_config(read_json(workdir / "config.json"))
    mesh, groups = make_mesh(devices=jax.devices()[:1]), kind_of(config).groups(config)
    with jax.set_mesh(mesh), Checkpoints(workdir / "checkpoints") as checkpoints:
        assert checkpoints.latest() == config.loop.steps
        like = init_state(groups, make_optimizers(groups, config.loop.steps), 0, mesh)
        state = jax.device_get(checkpoints.restore(like)[0])
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def differences(workdir: Path, other: Path) -> list[str]:
    """The arrays in which two finished runs differ, in any bit, and "losses" if a reported loss differs."""
    first, second = final_state(workdir), final_state(other)
    found = sorted(name for name in first.keys() | second.keys() if not np.array_equal(first[name], second[name]))
    losses = [[(row["step"], row["loss"]) for row in read_metrics(run)] for run in (workdir, other)]
    return found + ["losses"] * (losses[0] != losses[1])


def prepare(folder: Path) -> Path:
    """A latent cache of two hundred clips of the embedded world."""
    tiny = ROOT / "configs" / "tiny.py"
    if not (folder / "latents").exists():
        build = ["data", "build", "--source=world", "--limit=200", "--multiple=8", f"--out={folder / 'world'}"]
        train = ["train", f"--config={tiny}:autoencoder", f"--workdir={folder / 'autoencoder'}"]
        encode = ["data", "encode", f"--autoencoder={folder / 'autoencoder'}", f"--out={folder / 'latents'}"]
        data = f"{folder / 'world'}"
        for command in (build, [*train, f"--config.data={data}"], [*encode, f"--data={data}"]):
            process = start(folder / "prepare.log", cli.main, command)
            process.join()
            assert process.exitcode == 0, (folder / "prepare.log").read_text()[-2000:]
    return folder / "latents"


def train_tiny(latents: Path, steps: int, save_every: int) -> Begin:
    """Trains the tiny transformer; each step is reported."""
    changes = [f"latents={latents}", f"loop.steps={steps}", f"loop.save_every={save_every}", "loop.log_every=1"]
    command = ["train", f"--config={ROOT / 'configs' / 'tiny.py'}:transformer", *(f"--config.{c}" for c in changes)]
    return lambda workdir: start(log_of(workdir), cli.main, [*command, f"--workdir={workdir}"])


def table(kills: list[Kill], save_every: int, different: list[str], log: str) -> str:
    """Markdown: what the kills met and what they cost."""
    lost = [kill.lost for kill in kills]
    rows = {
        "kills": len(kills),
        "before the first step of that start": sum(k.fresh for k in kills),
        "while a checkpoint was being written": sum(k.saving for k in kills),
        "steps lost by a kill: median, most": f"{statistics.median(lost):g}, {max(lost)}",
        f"kills that lost more than {save_every} steps, the save of the last {save_every} still being written": sum(
            n > save_every for n in lost
        ),
        f"kills that lost more than {2 * save_every} steps": sum(n > 2 * save_every for n in lost),
        "checkpoints found damaged": log.count(" is damaged, "),
        "arrays and losses that differ from the undisturbed run": len(different),
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def main(out: Path, wanted: int, steps: int, save_every: int, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    latents = prepare(out)
    finish(train_tiny(latents, 2, 2), out / "warm")  # compiles, for the cache
    begin = train_tiny(latents, steps, save_every)
    pace = finish(begin, out / "straight")
    print(f"{pace.ready:.1f} s to the first step, {pace.seconds:.1f} s in all", flush=True)
    kills = []
    with open(out / "kills.jsonl", "w") as file:
        for kill in killed(begin, out / "killed", wanted, pace, seed):
            kills.append(kill)
            file.write(json.dumps(dataclasses.asdict(kill)) + "\n")
            file.flush()
    finish(begin, out / "killed")
    different = differences(out / "killed", out / "straight")
    text = table(kills, save_every, different, log_of(out / "killed").read_text())
    (out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data, runs and results")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2000, help="of the run")
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    main(options.out.absolute(), options.kills, options.steps, options.save_every, options.seed)
