"""`sora-jax sample --vbench`: files as VBench looks for them, made once, and made again by their recipes."""

import json
import re

import numpy as np
import pytest
from fixtures_runs import chain, run  # noqa: F401

from sora_jax.data.reading.media import decode
from sora_jax.errors import UserError
from sora_jax.generate.vbench import Listed, read_list

PROMPTS = ("a red square moves right", "a green square, waiting.")
OPTIONS = ("--steps=1", "--frames=5", "--height=16", "--width=16", "--samples=2")


def listed(folder, content, name="list.json"):
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def test_a_list_has_five_clips_of_a_prompt_and_more_of_those_that_are_filtered(tmp_path):
    entries = [
        {"prompt_en": "a", "dimension": ["color", "scene"], "auxiliary_info": {}},
        {"prompt_en": "b", "dimension": ["temporal_flickering"]},
        {"prompt_en": "a", "dimension": ["temporal_flickering"]},  # a prompt of two entries has the clips of both
        {"prompt_en": "A"},
    ]
    found = read_list(listed(tmp_path, entries))
    assert found == [Listed("a", 25), Listed("b", 25), Listed("A", 5)]
    assert read_list(listed(tmp_path, "a cat\n\n  a dog \n", "all_dimension.txt"), 3) == [
        Listed("a cat", 3),
        Listed("a dog", 3),
    ]
    assert len({each.row["clip_id"] for each in found}) == 3


def test_a_name_is_the_prompt_as_it_stands_cut_where_vbench_cuts_it(tmp_path):
    long = "x" * 200
    assert Listed("Hokusai, in the style of Ukiyo", 5).path(tmp_path, 4).name == "Hokusai, in the style of Ukiyo-4.mp4"
    assert Listed(long, 5).path(tmp_path, 0).stem == f"{'x' * 180}-0"


@pytest.mark.parametrize(
    "content, words",
    [
        ("[", "cannot be read"),
        ({"prompt_en": "a"}, "must be a list of objects with prompt_en"),
        ([], "must be a list of objects with prompt_en"),
        ([{"prompt": "a"}], "must be a list of objects with prompt_en"),
        ([{"prompt_en": "either/or"}], "'either/or' cannot be the name of a file"),
        ([{"prompt_en": "x" * 180 + "a"}, {"prompt_en": "x" * 180 + "b"}], "the same first 180 characters"),
    ],
)
def test_lists_that_cannot_be_are_told(tmp_path, content, words):
    with pytest.raises(UserError, match=words):
        read_list(listed(tmp_path, content))


def test_the_folder_is_completed_and_never_mixed(chain, tmp_path, capsys):  # noqa: F811
    out, prompts = tmp_path / "vbench", listed(tmp_path, "\n".join(PROMPTS), "prompts.txt")
    command = ("sample", f"--workdir={chain.transformer}", f"--vbench={prompts}", f"--out={out}", *OPTIONS)
    assert run(*command) == 0
    names = {f"{prompt}-{index}.mp4" for prompt in PROMPTS for index in (0, 1)}
    # All that VBench sees in the folder; the rule by which it reads a prompt from a name.
    assert {path.name for path in out.iterdir()} == names
    assert {re.sub(r"-\d+$", "", path.stem) for path in out.iterdir()} == set(PROMPTS)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(set(before.values())) == 4  # seeds and prompts make other clips
    gone, kept = sorted(names)[0], out / sorted(names)[1]
    (out / gone).unlink()
    written = kept.stat().st_mtime_ns
    capsys.readouterr()
    assert run(*command) == 0
    assert "3 of 4 clips are in" in capsys.readouterr().err
    assert (out / gone).read_bytes() == before[gone] and kept.stat().st_mtime_ns == written
    assert run(*command, "--steps=2") == 2
    assert "was made by another checkpoint or with other options: give another folder" in capsys.readouterr().err


def test_a_clip_is_made_again_by_its_recipe(chain, tmp_path):  # noqa: F811
    out, prompts = tmp_path / "vbench", listed(tmp_path, PROMPTS[0], "prompts.txt")
    assert run("sample", f"--workdir={chain.transformer}", f"--vbench={prompts}", f"--out={out}", *OPTIONS) == 0
    file = out / f"{PROMPTS[0]}-1.mp4"
    assert decode(file).frames.shape == (5, 16, 16, 3)  # its own pixels, not enlarged
    assert run("sample", f"--like={file}", f"--out={tmp_path / 'again.mp4'}") == 0
    np.testing.assert_array_equal(decode(tmp_path / "again.mp4").frames, decode(file).frames)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--vbench=list.txt", "--prompt=a"], "--vbench is given with --prompt; leave one of them out"),
        (["--vbench=list.txt", "--loop"], "--vbench is given with an option for clips; leave one of them out"),
        (["--vbench=list.txt"], "--out is not given; with --vbench it must be a folder"),
        (["--vbench=nowhere.txt", "--out=clips"], "--vbench is 'nowhere.txt'; there is no such file"),
        (["--prompt=a", "--samples=3"], "--samples is 3; it is for --vbench"),
    ],
)
def test_mistakes_are_told_in_a_sentence(chain, capsys, options, words):  # noqa: F811
    assert run("sample", f"--workdir={chain.transformer}", *options) == 2
    assert words in capsys.readouterr().err
