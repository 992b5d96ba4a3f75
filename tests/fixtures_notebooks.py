"""Execute the notebooks of colab/ in a folder of their own, and read what they show."""

import base64
import io
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image, ImageSequence

COLAB = Path(__file__).parents[1] / "colab"
NOTEBOOKS = sorted(path.name for path in COLAB.glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(COLAB / name, as_version=4)


def code_cells(name: str) -> list:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def pictures(page: str) -> list[np.ndarray]:
    """Return the frames (T, H, W, 3) of each picture inside a page."""
    found = re.findall(r"data:image/\w+;base64,([^\"]+)", page)
    files = [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]
    return [np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]) for file in files]


def shown(cells: list) -> list[list[np.ndarray]]:
    """Return the clips that each cell shows, of those that show any."""
    outputs = [output for cell in cells for output in cell.get("outputs", []) if "text/html" in output.get("data", {})]
    return [pictures("".join(output.data["text/html"])) for output in outputs]


def execute(notebook: nbformat.NotebookNode, folder: Path, python: str = sys.executable, **variables: object) -> list:
    """Run all cells in `folder` by an interpreter, with these environment variables; return them with their outputs."""
    kernel = folder / ".jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    command = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
    own = {"JUPYTER_PATH": kernel.parents[2], "JUPYTER_RUNTIME_DIR": folder / ".run", "IPYTHONDIR": folder / ".ipython"}
    environment = os.environ | {name: str(value) for name, value in (own | variables).items()}
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources)
    saved = dict(os.environ)
    os.environ.update(environment)  # Jupyter itself reads where its kernels are
    try:
        client.execute()
    finally:
        os.environ.clear()
        os.environ.update(saved)
    return notebook.cells
