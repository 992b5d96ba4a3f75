"""Golden files of networks (see tests/peers/make_model_goldens.py), and the weights they were made with."""

import json
from pathlib import Path

import numpy as np
from peers.tensors import random_weights

from sora_jax.convert.tensors import WEIGHTS, write_tensors
from sora_jax.files import write_json

FOLDER = Path(__file__).parent / "goldens_models"


class Golden(dict):
    """Arrays by name; `meta` as a dict; `weights` in the layout of PyTorch, made anew."""

    def __init__(self, name: str):
        with np.load(FOLDER / f"{name}.npz") as file:
            super().__init__(file)
        self.meta = json.loads(str(self.pop("meta")))
        self.weights = random_weights(self.meta.get("shapes", {}))

    def gradients(self) -> dict[str, np.ndarray]:
        """Of the loss, by the names of the weights."""
        return {name.removeprefix("gradient/"): x for name, x in self.items() if name.startswith("gradient/")}


def dit_weights(golden: Golden) -> dict[str, np.ndarray]:
    """The weights of a file: those of diffusers' blocks hold the embeddings of the first."""
    if "pos_embed" in golden:
        return golden.weights | {"pos_embed": golden["pos_embed"]}

    def first(name: str) -> str:
        block, _, rest = name.removeprefix("transformer_blocks.").partition(".")
        return f"transformer_blocks.0.{rest}" if block.isdigit() and rest.startswith("norm1.emb.") else name

    return {name: golden.weights[first(name)] for name in golden.weights}


def write_folder(folder: Path, golden: Golden, class_name: str, weights: dict, **changes) -> Path:
    """A folder as diffusers writes it."""
    write_tensors(folder / f"{WEIGHTS}.safetensors", weights)
    write_json(folder / "config.json", {"_class_name": class_name} | golden.meta["config"] | changes)
    return folder


def write_official(path: Path, golden: Golden, **changes) -> Path:
    """The official checkpoint as safetensors."""
    write_tensors(path, dit_weights(golden) | changes)
    return path
