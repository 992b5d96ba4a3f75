"""Captions made by looking: of clips of the world they are the world's own."""

import csv
import sys
import types

import numpy as np
import pytest
from fixtures_runs import run

from sora_jax.data.building.recaption import describe_world
from sora_jax.data.storing.manifest import Dataset
from sora_jax.data.viewing.write import write_video
from sora_jax.worlds import WorldConfig, clip

WORLD = WorldConfig(sizes=((48, 64),), frames=(9,), image_share=0.0, scale=(0.4, 0.5), backgrounds=("plain",))


def test_the_oracle_says_what_the_world_says():
    """Nearly always: a caption is wrong if any of colour, kind, motion, direction and background is."""
    pairs = [clip(WORLD, index) for index in range(24)]
    right = [describe_world(frames) == caption for frames, caption in pairs]
    assert np.mean(right) > 0.9
    assert describe_world(np.full((5, 32, 32, 3), 128, np.uint8)) == ""


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "clips"
    made.mkdir()
    frames, caption = clip(WORLD, 3)
    write_video(made / "one.mp4", frames, 8.0)
    write_video(made / "two.gif", clip(WORLD, 4)[0], 8.0)
    (made / "one.txt").write_text("something moves")
    (made / "broken.mp4").write_bytes(b"\0" * 64)
    return made, caption


def test_a_folder_is_captioned_and_its_own_captions_stay(folder, tmp_path, capfd):
    made, caption = folder
    out = tmp_path / "new.csv"
    assert run("data", "caption", f"--path={made}", "--how=world", f"--out={out}") == 0
    assert "2 clips captioned" in (told := capfd.readouterr().out) and "1 not readable" in told
    rows = {row["file"]: row for row in csv.DictReader(out.read_text().splitlines())}
    assert rows["one.mp4"]["caption_synthetic"] == caption
    assert rows["one.mp4"]["caption_original"] == "something moves"
    assert run("data", "caption", f"--path={made}", "--how=world", f"--out={out}") == 2
    assert "it exists, give another name" in capfd.readouterr().err
    (made / "one.txt").unlink()
    out.rename(made / "captions.csv")
    build = ["data", "build", f"--path={made}", f"--out={tmp_path / 'data'}", "--multiple=16", "--holdout=0"]
    assert run(*build) == 0
    found = {caption for row in Dataset(tmp_path / "data").rows() for caption in row["captions"]}
    assert {caption, "something moves"} <= found


def test_a_model_sees_the_frame_in_the_middle(folder, tmp_path, monkeypatch):
    """A stand-in for the pipeline of transformers, called as its version 5 asks."""
    seen = []

    def look(image, text, return_full_text):
        assert text == "" and not return_full_text
        seen.append(np.asarray(image).astype(int))
        return [{"generated_text": " a shape "}]

    made = types.SimpleNamespace(pipeline=lambda task, model: look if task == "image-text-to-text" else None)
    monkeypatch.setitem(sys.modules, "transformers", made)
    out = tmp_path / "new.csv"
    assert run("data", "caption", f"--path={folder[0]}", "--how=transformers:any", "--kind=blip", f"--out={out}") == 0
    assert {row["caption_blip"] for row in csv.DictReader(out.read_text().splitlines())} == {"a shape"}
    assert any(np.abs(frame - clip(WORLD, 4)[0][4]).mean() < 8 for frame in seen)


@pytest.mark.parametrize(
    "how, message", [("magic", "it must be world or transformers:MODEL"), ("transformers:no/such", "--how is")]
)
def test_what_cannot_caption_says_so(folder, tmp_path, capfd, how, message):
    assert run("data", "caption", f"--path={folder[0]}", f"--how={how}", f"--out={tmp_path / 'a.csv'}") == 2
    assert message in capfd.readouterr().err
