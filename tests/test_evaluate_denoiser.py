"""`sora-jax evaluate RUN`: a tiny run on held-out clips of the world and of others; what it writes and refuses."""

import json

import numpy as np
import pytest
from fixtures_runs import chain, run  # noqa: F401
from PIL import Image

from sora_jax.data.storing.manifest import Dataset, caption_of
from sora_jax.errors import UserError
from sora_jax.evaluate.evaluation import CLIP_COLUMNS, choose_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dataset folder of the full world in small, a third of it held out."""
    out = tmp_path_factory.mktemp("world") / "clips"
    options = ["--source=world", "--world=full", "--limit=18", "--holdout=0.34", "--multiple=8", "--workers=0"]
    assert run("data", "build", *options, "--max-frames=9", f"--out={out}") == 0
    return out


def test_the_command_measures_the_world_and_writes_its_files(chain, world, tmp_path, capsys):  # noqa: F811
    folder = chain.transformer
    capsys.readouterr()  # of the commands that made the two
    options = [f"--data={world}", "--count=2", "--steps=1", f"--out={tmp_path}"]
    assert run("evaluate", folder, *options, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "report.json").read_text())
    assert (
        printed["oracle"]
        and printed["clips"] == 2
        and printed["steps"] == "1"
        and list(printed["columns"]) == list(CLIP_COLUMNS)
    )
    real, generated = printed["columns"]["real"], printed["columns"]["generated"]
    assert real["agreement"]["all"] == real["constancy"]["identity_last"] == 1.0
    assert generated["agreement"]["all"] == 0.0  # the tiny run has learnt nothing
    assert len(generated["curves"]["identity"]) == 9
    assert np.asarray(Image.open(tmp_path / "consistency.png")).std() > 5
    assert run("evaluate", folder, *options, "--frames=5") == 0
    text = capsys.readouterr()
    for words in (
        "subject consistency",
        "motion, short sides a frame",
        "camera",
        "identity by frame",
        "2 of 3 held-out",
    ):
        assert words in text.out, words
    assert "evaluate: 100%" in text.err
    assert len(json.loads((tmp_path / "report.json").read_text())["columns"]["generated"]["curves"]["identity"]) == 5


def test_other_captions_leave_the_oracle_out(chain, tmp_path, capsys):  # noqa: F811
    assert run("evaluate", chain.transformer, f"--data={chain.dataset}", "--steps=1", f"--out={tmp_path}") == 0
    text = capsys.readouterr().out
    assert "oracle is left out: --data is" in text and "not in the words of the embedded world, which alone" in text
    assert "note         prompt 'a black square moves right' has words that the tokenizer of this run does not" in text
    assert "agreement" not in text and "flicker" in text and (tmp_path / "consistency.png").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ([], "RUN is not given; it must be the folder of a denoiser's run"),
        (["runs/a", "--autoencoder=runs/b"], "RUN is 'runs/a'; it must be left out beside --autoencoder"),
        (["runs/a", "--tile=0x8x8"], "--tile is 0x8x8; it must be left out with RUN"),
        (["runs/a", "--clips=3"], "--clips is 3; it must be left out with RUN"),
        (["--autoencoder=runs/b", "--steps=3"], "--steps is 3; it must be left out with --autoencoder"),
        (["runs/a", "--count=0"], "--count is 0; it must be at least 1"),
        (["runs/a", "--frames=1"], "--frames is 1; it must be at least 2"),
        (["runs/a", "--seed=-1"], "--seed is -1; it must be from 0 to 4294967295"),
        (["runs/a"], "RUN is 'runs/a'; there is no config.json, so it is not a run folder"),
    ],
)
def test_mistakes_are_told_in_a_sentence(capsys, options, words):
    assert run("evaluate", *options, "--data=nowhere") == 2
    assert words in capsys.readouterr().err


def test_a_folder_that_is_no_run_of_a_denoiser_is_refused(chain, capsys):  # noqa: F811
    assert run("evaluate", chain.autoencoder, f"--data={chain.dataset}") == 2
    assert "must be 'denoiser'" in capsys.readouterr().err


def test_prompts_are_held_out_and_not_among_the_training_captions(world):
    dataset = Dataset(world)
    rows, available, notes = choose_rows(dataset, "train", 100)
    trained = {caption_of(row) for row in dataset.rows("train")}
    assert available == len(rows) == len([row for row in dataset.held_out() if row["frames"] > 1]) and not notes
    assert all(row["split"] == "held-out" and row["frames"] > 1 for row in rows)
    assert not trained & {caption_of(row) for row in rows}


class Rows:
    """A dataset of videos with these captions, the second list held out."""

    path = "data/clips"

    def __init__(self, trained, held_out):
        self._trained, self._held_out = (
            [{"captions": [caption], "frames": 9, "height": 8, "width": 8} for caption in captions]
            for captions in (trained, held_out)
        )

    def rows(self, split):
        return self._trained

    def held_out(self, trained):
        return self._held_out


def test_captions_of_training_clips_are_prompts_only_where_there_are_no_others():
    rows, available, notes = choose_rows(Rows(["a", "b"], ["a", "c", "", "b"]), "train", 9)
    assert [caption_of(row) for row in rows] == ["c"] and available == 1 and not notes
    rows, available, notes = choose_rows(Rows(["a", "b"], ["a", "b"]), "train", 1)
    assert len(rows) == 1 and available == 2
    assert notes == ["each held-out caption is also that of a training clip"]
    rows, available, notes = choose_rows(Rows(["a"], ["b", "b"]), "train", 3, "train")
    assert available == 1 and notes == ["the run was trained on these clips"]
    with pytest.raises(UserError, match="--data is 'data/clips'; it must hold out clips with captions"):
        choose_rows(Rows(["a"], [""]), "train", 3)
