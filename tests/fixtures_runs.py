"""A chain of tiny runs, made once for all test files: clips, dataset, autoencoder, latents, transformer.

A test file imports the fixtures that it uses. What they return is shared, so it must not be changed: copy it.
"""

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sora_jax import cli
from sora_jax.data.media import write_video

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


@dataclasses.dataclass(frozen=True)
class Chain:
    """Folders of the chain, each made by the command of its name."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        return self.folder / name


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
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "SORA_JAX_CACHE": cache}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=environment, cwd=ROOT, **pipes, **options)


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


@functools.cache  # pytest makes an imported fixture anew for each file that imports it
def make_chain(folder: Path) -> Chain:
    """The chain, by all commands up to `sample`, with their own settings."""
    made = Chain(folder)
    write_clips(made.clips)
    assert run(*build_options(made.clips, made.dataset)) == 0
    previews = ["loop.steps=6", "loop.save_every=3", "loop.preview_every=6"]
    assert run(*train_options("autoencoder", made.autoencoder, f"data={made.dataset}", *previews)) == 0
    encode = ["data", "encode", f"--autoencoder={made.autoencoder}", f"--data={made.dataset}", f"--out={made.latents}"]
    assert run(*encode) == 0
    show = ["preview.prompts=('a red square moves right','a green square')", "preview.sizes=((9,16,24),(1,16,16))"]
    show += ["preview.steps=2"]
    assert run(*train_options("transformer", made.transformer, f"latents={made.latents}", *previews, *show)) == 0
    return made


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Chain:
    """The folders clips, dataset, autoencoder, latents and transformer."""
    return make_chain(tmp_path_factory.getbasetemp() / "chain")


@pytest.fixture(scope="session")
def trained(chain):
    """The trained transformer of the chain, loaded."""
    from sora_jax.generate.run import load_run

    with one_device():
        return load_run(chain.transformer)
