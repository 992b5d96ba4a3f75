"""From a folder of videos to generated files, by the commands of the command line alone."""

import json

import numpy as np
import pytest
from fixtures_runs import CLIPS, chain, run  # noqa: F401

from sora_jax.data.reading.media import decode
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.manifest import Dataset
from sora_jax.train.metrics import read_metrics


def test_every_stage_leaves_what_it_promises(chain):  # noqa: F811
    dataset, cache = Dataset(chain.dataset), LatentCache(chain.latents)
    assert sorted(row["captions"][0] for row in dataset.rows()) == sorted(clip[2] for clip in CLIPS)
    sizes, names = {clip[0]: clip[1] for clip in CLIPS}, {row["id"]: row["file"] for row in dataset.rows()}
    for row, grid in zip(cache.ids(range(len(cache))), cache.grids, strict=True):
        frames, height, width = sizes[names[row].removesuffix(".mp4")]
        assert tuple(grid) == (1 + (frames - 1) // 4, height // 4, width // 4)
    for workdir, kind in ((chain.autoencoder, "autoencoder"), (chain.transformer, "denoiser")):
        assert json.loads((workdir / "config.json").read_text())["kind"] == kind
        assert [row["step"] for row in read_metrics(workdir)] == list(range(1, 7))
        assert list((workdir / "tensorboard").glob("events*"))
        assert sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == ["3", "6"]
    assert (chain.autoencoder / "samples" / "step_000006.png").exists()
    assert decode(chain.transformer / "samples" / "step_000006" / "00.mp4").frames.shape[0] == 9
    assert (chain.transformer / "samples" / "progress.png").exists()


@pytest.mark.parametrize("ending", ["mp4", "gif", "webp"])
def test_sampled_clips_are_files_of_the_size_asked_for(chain, tmp_path, ending):  # noqa: F811
    out = tmp_path / "new" / f"clip.{ending}"
    size = ["--frames=5", "--height=16", "--width=24", "--steps=2", "--fps=8", "--upscale=1"]
    assert run("sample", f"--workdir={chain.transformer}", "--prompt=a red square", *size, f"--out={out}") == 0
    clip = decode(out)
    assert clip.frames.shape == (5, 16, 24, 3) and abs(clip.fps - 8) < 0.5


def test_a_png_is_one_frame_and_several_prompts_are_numbered(chain, tmp_path):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("a blue square\n\na green square\n")
    prompts = ["--prompt=a red square", f"--prompts-file={tmp_path / 'prompts.txt'}"]
    out = tmp_path / "image.png"
    assert run("sample", f"--workdir={chain.transformer}", *prompts, "--steps=2", "--upscale=2", f"--out={out}") == 0
    written = sorted(path.name for path in tmp_path.glob("*.png"))
    assert written == ["image_000.png", "image_001.png", "image_002.png"]
    pictures = [decode(tmp_path / name).frames for name in written]
    assert all(picture.shape == (1, 32, 48, 3) for picture in pictures)
    assert not np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize(
    "options, told",
    [
        (["--sampling.solver.eta=1"], "--sampling.solver.eta is given; it is for ddim, and the solver is euler"),
        (["--solver=edm", "--sampling.solver.coefficient=sine"], "it is for euler_sde, heun_sde, and the solver is"),
        (["--guidance=2", "--sampling.guidance.scale=9"], "--guidance and --sampling.guidance.scale are both given"),
        (["--solver="], "solver is ''; allowed: 'euler'"),
        (["--steps=3", "--sampling.steps=4"], "--steps and --sampling.steps are both given"),
    ],
)
def test_options_that_would_change_nothing_are_refused(chain, tmp_path, capsys, options, told):  # noqa: F811
    clip = ["--prompt=a red square", "--frames=5", "--height=16", "--width=24", f"--out={tmp_path / 'clip.gif'}"]
    assert run("sample", f"--workdir={chain.transformer}", *clip, *options) == 2
    assert told in capsys.readouterr().err and list(tmp_path.iterdir()) == []
