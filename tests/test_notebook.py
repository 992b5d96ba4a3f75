"""The notebook runs from its first cell to its last; what it needs of the package is there, and cheap."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image, ImageSequence

import sora_jax
from sora_jax.errors import UserError
from sora_jax.generate.show import show

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "colab" / "quickstart.ipynb"


def is_install(cell) -> bool:
    return "install" in cell.metadata.get("tags", [])


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """(folder, cells): the notebook run in an empty folder by this interpreter, but for its installation."""
    folder = tmp_path_factory.mktemp("notebook")
    kernel = folder / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not is_install(cell)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("SORA_JAX_CACHE", os.environ["JAX_COMPILATION_CACHE_DIR"])
        patch.setenv("SORA_JAX_QUICKSTART", f"{ROOT / 'configs' / 'quickstart.py'}:tiny")
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    return folder, notebook.cells


def pictures(html: str) -> list[np.ndarray]:
    """The frames (T, H, W, 3) of each picture inside a page."""
    found = re.findall(r"data:image/\w+;base64,([^\"]+)", html)
    files = [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]
    return [np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]) for file in files]


def test_the_notebook_trains_and_shows_clips_of_the_sizes_asked_for(executed):
    folder, cells = executed
    assert (folder / "runs" / "quickstart" / "report.json").exists()
    pages = ["".join(output.data["text/html"]) for cell in cells for output in cell.get("outputs", [])
             if "text/html" in output.get("data", {})]  # fmt: skip
    first, second = ([clip.shape[:3] for clip in pictures(page)] for page in pages)
    assert [(frames, width / height) for frames, height, width in first] == [(9, 36 / 24), (1, 1)]
    assert [(frames, width / height) for frames, height, width in second] == [(9, 36 / 24)] * 2


def test_the_notebook_is_kept_clean_and_begins_with_its_installation():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [is_install(cell) for cell in code] == [True] + [False] * (len(code) - 1)
    assert "%pip install" in code[0].source
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_show_keeps_every_pixel_of_every_frame():
    rng = np.random.default_rng(0)
    palette = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255]], np.uint8)
    clips = [palette[rng.integers(4, size=size)] for size in ((5, 8, 12), (1, 100, 30))]
    shown = pictures(show(clips, ["a", "b"]).data)
    assert len(shown) == 2
    for clip, seen in zip(clips, shown, strict=True):
        scale = seen.shape[1] // clip.shape[1]
        np.testing.assert_array_equal(seen, clip.repeat(scale, axis=1).repeat(scale, axis=2))


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
