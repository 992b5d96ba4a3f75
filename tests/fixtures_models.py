"""Golden files of networks (see tests/peers/make_model_goldens.py), and the weights they were made with."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from peers.tensors import random_weights

from sora_jax.convert.tensors import WEIGHTS, write_tensors
from sora_jax.data.packing.packs import PackingConfig, PackItem, pack, stack, unpatchify
from sora_jax.files import write_json
from sora_jax.nn.pack import Pack

STEPS, LABELS = np.array([0, 500, 999]), (1, 10, 4)
PACKINGS = {  # three images side by side, each with its own padding; and in one sequence, in another order
    "apart": ([[0], [1], [2]], PackingConfig(20, 1, 1, (1, 2, 2))),
    "together": ([[2, 0, 1]], PackingConfig(56, 4, 4, (1, 2, 2))),
}
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


class Images:
    """Three images in packs, at these times, and the way back."""

    def __init__(self, layout: str, times=(STEPS + 1) / 1000):
        self.rows, self.config = PACKINGS[layout]
        self.pack = self.of(np.zeros((3, 4, 8, 8), np.float32))
        times_BR = np.ones(self.pack.row_slots_BR.shape, np.float32)
        for b, row in enumerate(self.rows):
            for slot, image in enumerate(row):
                times_BR[b, np.asarray(self.pack.row_slots_BR[b]) == slot] = times[image]
        self.times_BR = jnp.asarray(times_BR)

    def of(self, images: np.ndarray) -> Pack:
        latents = np.moveaxis(images, 1, -1)[:, None]
        labels = [label if label < 10 else -1 for label in LABELS]
        items = [
            PackItem(z, np.uint32(i + 1), np.array([0]), label=label)
            for i, (z, label) in enumerate(zip(latents, labels, strict=True))
        ]
        packs = stack([pack([items[i] for i in row], self.config) for row in self.rows])
        return Pack(**{name: jnp.asarray(x) for name, x in packs.items()})

    def back(self, tokens_BLP) -> np.ndarray:
        """(B, L, P or 2 P) -> (3, C or 2 C, 8, 8): predictions, then variance values."""
        tokens, images = np.asarray(tokens_BLP), {}
        for b, row in enumerate(self.rows):
            for slot, image in enumerate(row):
                own = tokens[b][np.asarray(self.pack.segments_BL[b]) == slot + 1]
                parts = [unpatchify(part, (1, 4, 4), (1, 2, 2))[0] for part in np.split(own, own.shape[-1] // 16, -1)]
                images[image] = np.moveaxis(np.concatenate(parts, -1), -1, 0)
        return np.stack([images[i] for i in range(3)])
