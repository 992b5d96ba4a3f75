"""Execute the notebooks of colab/ by this interpreter, in a folder of their own."""

import json
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

COLAB = Path(__file__).parents[1] / "colab"
NOTEBOOKS = sorted(path.name for path in COLAB.glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(COLAB / name, as_version=4)


def execute(notebook: nbformat.NotebookNode, folder: Path, **variables: object) -> list:
    """Run all cells in `folder`, with these environment variables; return the cells with their outputs."""
    kernel = folder / ".jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
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
