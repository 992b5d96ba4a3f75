"""A studio of the page with the tiny run, and clips that a visitor uploads."""

import dataclasses

import pytest
from fixtures_media import noise
from fixtures_runs import chain, one_device, trained  # noqa: F401

from sora_jax import cli
from sora_jax.data.viewing.write import save_png, write_video
from sora_jax.demo.fields import area_mask
from sora_jax.demo.studio import Studio


@pytest.fixture(scope="module")
def studio(chain, trained):  # noqa: F811
    """A studio with the tiny run."""
    with one_device():
        quick = dataclasses.replace(trained.config.sampling, steps="2")  # what the page proposes
        quick = dataclasses.replace(trained, config=dataclasses.replace(trained.config, sampling=quick))
        yield Studio(quick, "transformer", chain.transformer, cli.parsed)


@pytest.fixture(scope="module")
def uploads(studio, tmp_path_factory):
    """Clips of other sizes than those of the run, as they are uploaded, by name."""
    folder = tmp_path_factory.mktemp("uploads")
    write_video(folder / "clip.mp4", noise(9, 48, 72), 8)
    write_video(folder / "other.gif", noise(5, 40, 60), 8)
    save_png(folder / "mask.png", area_mask("middle", 48, 72)[0])
    return {file.stem: studio.pick(file.name, file.read_bytes()) for file in folder.iterdir()}
