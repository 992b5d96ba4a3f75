"""A chain of tiny runs, each made once for all test files: clips, dataset, autoencoder, latents, transformer.

A test file imports the fixtures that it uses. What they return is shared, so it must not be changed: copy it.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from sora_jax import cli
from sora_jax.data.viewing.write import write_video

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.py"
CLIPS = [  # name, (frames, height, width), caption, split
    ("red", (9, 16, 24), "a red square moves right", "train"),
    ("blue", (5, 24, 16), "a blue square moves down", "train"),
    ("green", (9, 16, 24), "a green square waits", "train"),
    ("grey", (5, 24, 16), "a grey square moves left", "train"),
    ("white", (5, 24, 16), "a white square moves up", "train"),
    ("black", (9, 16, 24), "a black square moves right", "held-out"),
]


@contextlib.contextmanager
def one_device():
    """The package sees one device, as on most laptops: programs for eight take several times longer to compile."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        patch.setenv("SORA_JAX_CACHE", os.environ["JAX_COMPILATION_CACHE_DIR"])
        yield


def run(*arguments) -> int:
    """A command in this process; its exit code."""
    with one_device():
        return cli.main([str(argument) for argument in arguments])


def start(*arguments, **options) -> subprocess.Popen:
    """A command as a process of its own, on one CPU device, with pipes for its output."""
    command = [sys.executable, "-m", "sora_jax.cli", *map(str, arguments)]
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SORA_JAX_CACHE": cache}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=environment, cwd=ROOT, **pipes, **options)


def with_random_weights(run):
    """Return a run with random weights added: after a few steps of training its gates are still almost closed."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), run.params)
    return dataclasses.replace(run, params=params)


def write_clips(folder: Path) -> None:
    """Six mp4s of a bright square on noise, and captions.csv."""
    rows = ["file,caption,split"]
    for number, (name, (frames, height, width), caption, split) in enumerate(CLIPS):
        video = np.random.default_rng(number).integers(0, 60, (frames, height, width, 3), dtype=np.uint8)
        for t in range(frames):
            video[t, 4:10, t : t + 6] = 40 * number + 40
        write_video(folder / f"{name}.mp4", video, 8)
        rows.append(f"{name}.mp4,{caption},{split}")
    (folder / "captions.csv").write_text("\n".join(rows))


def build_options(path: Path, out: Path) -> list:
    return ["data", "build", f"--path={path}", f"--out={out}", "--max-frames=9", "--multiple=8", "--max-pixels=384"]


def train_options(variant: str, workdir: Path, *changes: str) -> list:
    return ["train", f"--config={TINY}:{variant}", f"--workdir={workdir}", *(f"--config.{c}" for c in changes)]


PREVIEWS = ["loop.steps=6", "loop.save_every=3", "loop.preview_every=6"]
PROMPTS = ["preview.prompts=('a red square moves right','a green square')", "preview.sizes=((9,16,24),(1,16,16))"]
PROMPTS += ["preview.steps=2"]


def made_once(folder: Path, make: Callable[[], object]) -> Path:
    """Return `folder`, which the first process that asks has made; the others wait for it."""
    done = folder.with_name(f"{folder.name}.made")
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it when a process dies
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make()
            done.touch()
    return folder


@dataclasses.dataclass(frozen=True)
class Chain:
    """Folders of the chain, each made by the command of its name, with its own settings, when it is first asked for."""

    folder: Path

    def made(self, name: str, command: Callable[[Path], list]) -> Path:
        folder = self.folder / name

        def make():
            assert run(*command(folder)) == 0

        return made_once(folder, make)

    @property
    def clips(self) -> Path:
        return made_once(self.folder / "clips", lambda: write_clips(self.folder / "clips"))

    @property
    def dataset(self) -> Path:
        return self.made("dataset", lambda out: build_options(self.clips, out))

    @property
    def autoencoder(self) -> Path:
        changes = [f"data={self.dataset}", *PREVIEWS]
        return self.made("autoencoder", lambda out: train_options("autoencoder", out, *changes))

    @property
    def latents(self) -> Path:
        options = [f"--autoencoder={self.autoencoder}", f"--data={self.dataset}"]
        return self.made("latents", lambda out: ["data", "encode", *options, f"--out={out}"])

    @property
    def transformer(self) -> Path:
        changes = [f"latents={self.latents}", *PREVIEWS, *PROMPTS]
        return self.made("transformer", lambda out: train_options("transformer", out, *changes))

    @property
    def quickstart(self) -> Path:
        """Return the work folder of the quickstart in its smallest form."""
        form = f"--config={ROOT / 'configs' / 'quickstart.py'}:tiny"
        return self.made("quickstart", lambda out: ["quickstart", form, f"--workdir={out}"])


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Chain:
    """The chain of this test run: pytest's workers share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "chain"
    folder.mkdir(exist_ok=True)
    return Chain(folder)


@pytest.fixture(scope="session")
def trained(chain):
    """The trained transformer of the chain, loaded."""
    from sora_jax.generate.run import load_run

    with one_device():
        return load_run(chain.transformer)
