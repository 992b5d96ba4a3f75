"""The notebooks run from their first cell to their last; what they need of the package is there, and cheap.

`.ci/test_notebooks.py` runs those that train, installed from a wheel.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from fixtures_notebooks import NOTEBOOKS, code_cells, execute, pictures, read, shown
from fixtures_runs import ROOT, chain  # noqa: F401

import sora_jax
from sora_jax.errors import UserError
from sora_jax.generate.show import save, show

BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def settings(**more) -> dict:
    return {"PYTHONPATH": ROOT, "SORA_JAX_CACHE": os.environ["JAX_COMPILATION_CACHE_DIR"]} | more


def test_the_quickstart_shows_clips_of_the_sizes_asked_for(chain, tmp_path):  # noqa: F811
    """The stages that the shared run has completed are skipped, as when the cell is run again."""
    shutil.copytree(chain.quickstart, tmp_path / "runs" / "quickstart")
    form = f"{ROOT / 'configs' / 'quickstart.py'}:tiny"
    cells = execute(read("quickstart.ipynb"), tmp_path, **settings(SORA_JAX_QUICKSTART=form))
    first, second = ([clip.shape[:3] for clip in clips] for clips in shown(cells))
    assert [(frames, width / height) for frames, height, width in first] == [(9, 36 / 24), (1, 1)]
    assert [(frames, width / height) for frames, height, width in second] == [(9, 36 / 24)] * 2


def test_the_tasks_show_clips_of_the_lengths_asked_for(chain, tmp_path):  # noqa: F811
    run = chain.quickstart / "transformer"
    cells = execute(read("tasks.ipynb"), tmp_path, **settings(SORA_JAX_RUN=run, SORA_JAX_SHORT=1))
    lengths = [[len(clip) for clip in clips] for clips in shown(cells)]
    # 9 frames; an image and two clips; + 8 and 8 +; loops of 8 and 9 - 1 + 8; 9 + 8 + 9; three edits
    assert lengths == [[9, 1], [1, 9, 9], [9, 17, 17], [8, 16], [9, 9, 26], [9, 9, 9]]
    assert (tmp_path / "long.gif").exists()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_clean_and_begins_with_its_installation(name):
    nbformat.validate(read(name))
    code = code_cells(name)
    assert ["install" in cell.metadata.get("tags", []) for cell in code[:3]] == [False, True, False]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert code[1].source == code_cells(NOTEBOOKS[0])[1].source
    same = [re.sub(r"print\(\"(?!Found).*\"\)$", "", cells[0].source) for cells in (code, code_cells(NOTEBOOKS[0]))]
    assert same[0] == same[1]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_badge_has_the_address_of_the_repository_if_there_is_one(name):
    """CITATION.cff is the one place: `repository-code`; then it is also what the notebook installs."""
    found = re.search(
        r"^repository-code: *\"?(https://github.com/([^\s\"]+))", (ROOT / "CITATION.cff").read_text(), re.M
    )
    title, install = read(name).cells[0].source, code_cells(name)[1].source
    if not found:
        assert BADGE not in title and 'SOURCE = ""' in install
        return
    link = f"https://colab.research.google.com/github/{found[2]}/blob/main/colab/{name}"
    assert f"[![Open in Colab]({BADGE})]({link})" in title
    assert f'SOURCE = "git+{found[1]}"' in install


def install(monkeypatch, folder: Path, code: int = 0) -> list[str]:
    """Run the cell that installs where the package is missing; return what it would give to pip."""
    calls = []

    def pip(command, **_):
        calls.append(command[-1])
        return subprocess.CompletedProcess(command, code, "", "a line\nERROR: no such thing")

    monkeypatch.chdir(folder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", pip)
    exec(code_cells("tasks.ipynb")[1].source, {"os": os, "subprocess": subprocess, "extra": "[cuda]"})
    return calls


def test_the_notebook_installs_the_checkout_that_it_lies_in_or_what_source_says(monkeypatch, tmp_path):
    (tmp_path / "colab").mkdir()
    (tmp_path / "setup.cfg").touch()
    assert install(monkeypatch, tmp_path / "colab") == ["..[cuda]"]
    monkeypatch.setenv("SOURCE", "sora_jax-1-py3-none-any.whl")
    assert install(monkeypatch, tmp_path / "colab") == ["sora_jax-1-py3-none-any.whl[cuda]"]


@pytest.mark.parametrize(
    "source, sentence", [("", "Set SOURCE in this cell"), ("nothing", "pip cannot install it: ERROR")]
)
def test_an_installation_that_cannot_work_ends_with_a_sentence(monkeypatch, tmp_path, source, sentence):
    monkeypatch.setenv("SOURCE", source)
    with pytest.raises(Exception, match=sentence) as stopped:
        install(monkeypatch, tmp_path, code=1)
    assert stopped.value._render_traceback_() == [str(stopped.value)]  # what IPython shows in place of a traceback
    assert "\n" not in str(stopped.value)


def test_show_keeps_every_pixel_of_every_frame():
    rng = np.random.default_rng(0)
    palette = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255]], np.uint8)
    clips = [palette[rng.integers(4, size=size)] for size in ((5, 8, 12), (1, 100, 30))]
    found = pictures(show(clips, ["a", "b"]).data)
    assert len(found) == 2
    for clip, seen in zip(clips, found, strict=True):
        scale = seen.shape[1] // clip.shape[1]
        np.testing.assert_array_equal(seen, clip.repeat(scale, axis=1).repeat(scale, axis=2))


def test_mistakes_in_python_name_arguments_and_the_way_out(capsys, tmp_path):
    show([np.zeros((1, 8, 8, 3), np.uint8)])  # tests run in no notebook
    assert "write a file by sora_jax.save(clip, path)" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^path is .*x\.xyz; it must end in "):
        save(np.zeros((5, 8, 8, 3), np.uint8), tmp_path / "x.xyz")
    with pytest.raises(UserError, match="^folder is 'wrld'; .*did you mean world"):
        sora_jax.load_run("wrld")
    with pytest.raises(TypeError, match="no argument 'height'; the size is sizes="):
        sora_jax.generate("a red circle", height=48)
    for prompts in (None, 3, [None]):
        with pytest.raises(UserError, match="^prompts is .*; it must be a text, or a list of texts"):
            sora_jax.generate(prompts)
    with pytest.raises(UserError, match="one size for each prompt, not 2 prompts and 1 size$"):
        sora_jax.generate(["a red circle"] * 2, [(9, 48, 72)])
    with pytest.raises(UserError, match="^guidance is -3; it must be at least 0"):
        sora_jax.generate("a red circle", guidance=-3)


def test_captions_are_text_and_one_for_each_clip():
    clips = [np.zeros((1, 8, 8, 3), np.uint8)] * 2
    page = show(clips, ["<b>&", "it's"]).data
    assert page.count("&lt;b&gt;&amp;") and "<b>" not in page
    assert len(pictures(show(clips).data)) == 2
    with pytest.raises(UserError, match="2 clips and 1 captions"):
        show(clips, ["one"])


def test_importing_the_package_is_cheap_and_loads_no_jax():
    """By what it loads, which is the same on a busy machine: a few modules of Python's own and of the package."""
    program = "import sys; before = set(sys.modules); import sora_jax; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = done.stdout.split()
    assert {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names == {"sora_jax"}
    assert len(loaded) < 30, loaded


def test_the_lazy_names_are_the_real_ones():
    assert sora_jax.show is show
    assert set(sora_jax.__all__) <= set(dir(sora_jax))
    with pytest.raises(AttributeError, match="no attribute 'lode_run'"):
        sora_jax.lode_run  # noqa: B018
