"""Run the notebooks that train, in their short form, as on Colab: from an empty folder, installed from a wheel.

    .venv/bin/pytest -n 0 .ci/test_notebooks.py

`.ci/run` does so; the suite does not, since it needs a package index and minutes.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fixtures_notebooks import execute, read, shown  # noqa: E402


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """An interpreter that has a kernel of Jupyter and nothing else."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "-q", "ipykernel"], check=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", f"--wheel-dir={folder}", ROOT], check=True)
    return next(folder.glob("*.whl"))


def test_without_a_source_there_is_a_sentence_and_no_traceback(python, tmp_path):
    notebook = read("own_video.ipynb")
    with pytest.raises(CellExecutionError):
        execute(notebook, tmp_path, str(python), SOURCE="", PYTHONPATH="")
    (stopped,) = [out for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "error"]
    assert len(stopped.traceback) == 1 and stopped.traceback[0].startswith("Set SOURCE in this cell")


@pytest.mark.parametrize("name, clips", [("own_video.ipynb", [4]), ("dit_by_class.ipynb", [10, 3])])
def test_a_notebook_trains_and_shows_clips(name, clips, python, wheel, tmp_path):
    cells = execute(read(name), tmp_path, str(python), SOURCE=wheel, PYTHONPATH="", SORA_JAX_SHORT=1)
    assert [len(found) for found in shown(cells)] == clips
