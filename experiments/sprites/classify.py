"""Score generated characters by a classifier that is trained on real ones.

    python experiments/sprites/classify.py --workdir=runs/sprites --data=data/sprites --guidance=2

A small convolutional network learns from the clips of the split "train" what a caption says: skin, hair, clothes,
shoes, action and direction. It is then asked about held-out characters, which neither the classifier nor the model has
seen: about their real clips, about these through the autoencoder, and about clips generated from their captions.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

from sora_jax.data.storing.manifest import Dataset, caption_of
from sora_jax.files import write_json
from sora_jax.generate.run import load_run

CAPTION = re.compile(
    r"a pixel-art character with (?P<skin>[^,]+), (?P<hair>[^,]+), (?P<torso>[^,]+), (?P<legs>.+) and "
    r"(?P<shoes>[^,]+), (?P<action>[^,]+), (?P<direction>[^,]+)"
)
COLOURS = ("skin", "hair", "torso", "legs", "shoes")
FACTS = (*COLOURS, "action", "direction")
FRAMES = (0, 2, 4, 6, 8)  # that the classifier sees
SHIFT = 2  # pixels by which training clips are moved
BATCH = 64


def facts_of(caption: str) -> dict[str, str]:
    """Return what a caption says of each fact."""
    found = CAPTION.fullmatch(caption)
    if not found:
        raise ValueError(f"{caption!r} is no caption of this data set")
    return found.groupdict()


class Classifier(linen.Module):
    """Classify stacked frames (B, H, W, frames * 3): one vector of logits for each fact."""

    classes: Mapping[str, int]

    @linen.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        for width in (32, 64, 96, 128):
            x = linen.Conv(width, (3, 3), strides=2)(x)
            x = linen.relu(linen.GroupNorm(8)(x))
        x = x.reshape(len(x), -1)
        return {fact: linen.Dense(count)(linen.relu(linen.Dense(128)(x))) for fact, count in self.classes.items()}


def stacked(clips: Sequence[np.ndarray]) -> np.ndarray:
    """Stack the frames of uint8 clips (9, H, W, 3) into channels: float32 (B, H, W, frames * 3) in [-1, 1]."""
    x = np.stack([clip[list(FRAMES)] for clip in clips]).astype(np.float32) / 127.5 - 1
    return np.moveaxis(x, 1, 3).reshape(*x.shape[:1], *x.shape[2:4], -1)


def disturbed(key: jax.Array, x: jax.Array) -> jax.Array:
    """Move a batch by up to SHIFT pixels and add noise, so that the classifier depends on no single pixel."""
    where, noise, size = jax.random.split(key, 3)
    offset = jax.random.randint(where, (2,), -SHIFT, SHIFT + 1)
    return jnp.roll(x, offset, (1, 2)) + 0.15 * jax.random.uniform(size) * jax.random.normal(noise, x.shape)


def train(x: np.ndarray, labels: Mapping[str, np.ndarray], classes: Mapping[str, int], epochs: int, seed: int):
    """Train a classifier; return a function from stacked frames to the class of each fact."""
    model = Classifier(classes)
    steps = epochs * (len(x) // BATCH)
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2)
    params = model.init(jax.random.key(seed), x[:1])
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x, labels, key):
        def loss(params):
            logits = model.apply(params, disturbed(key, x))
            each = optax.softmax_cross_entropy_with_integer_labels
            return sum(each(logits[fact], labels[fact]).mean() for fact in classes)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(seed)
    for number in range(steps):
        chosen = rng.choice(len(x), BATCH, replace=False)
        batch = {fact: values[chosen] for fact, values in labels.items()}
        key = jax.random.fold_in(jax.random.key(seed), number)
        params, state = step(params, state, x[chosen], batch, key)

    @jax.jit
    def classify(x):
        return {fact: jnp.argmax(logits, axis=-1) for fact, logits in model.apply(params, x).items()}

    return classify


def rates(found: Mapping[str, np.ndarray], said: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the share of clips in which each fact is read as its caption says it, and their summaries."""
    right = {fact: np.asarray(found[fact]) == said[fact] for fact in FACTS}
    shares = {fact: float(values.mean()) for fact, values in right.items()}
    shares["colours"] = float(np.mean([shares[fact] for fact in COLOURS]))
    shares["all seven"] = float(np.all(list(right.values()), axis=0).mean())
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="run of the transformer, or the name of a model")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder with the real clips")
    parser.add_argument("--count", type=int, default=360, help="held-out clips")
    parser.add_argument("--epochs", type=int, default=20, help="of the classifier")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=None, help="default: the run's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a .json to write the figures to")
    options = parser.parse_args()
    run, dataset = load_run(options.workdir), Dataset(options.data)
    rows = list(dataset.rows())
    train_rows = [row for row in rows if row["split"] == "train"]
    held_out = [row for row in rows if row["split"] != "train"]
    held_out = [held_out[i] for i in np.unique(np.linspace(0, len(held_out) - 1, options.count).astype(int))]
    words = {fact: sorted({facts_of(caption_of(row))[fact] for row in train_rows}) for fact in FACTS}

    def labels_of(chosen: Sequence[dict]) -> dict[str, np.ndarray]:
        facts = [facts_of(caption_of(row)) for row in chosen]
        return {fact: np.array([words[fact].index(each[fact]) for each in facts]) for fact in FACTS}

    classes = {fact: len(known) for fact, known in words.items()}
    x = stacked([dataset[row["index"]].frames for row in train_rows])
    classify = train(x, labels_of(train_rows), classes, options.epochs, options.seed)
    real = [dataset[row["index"]].frames for row in held_out]
    with jax.set_mesh(run.mesh):
        decoded = list(run.autoencoder.decode(run.autoencoder.encode(real)))
    captions, sizes = [caption_of(row) for row in held_out], [clip.shape[:3] for clip in real]
    generated = run.generate(captions, sizes, options.steps, options.guidance, options.seed)
    said = labels_of(held_out)
    table = {
        name: rates(classify(stacked(clips)), said)
        for name, clips in {"real": real, "through the autoencoder": decoded, "generated": generated}.items()
    }
    for name, shares in table.items():
        print(f"{name:24} " + ", ".join(f"{fact} {share:.1%}" for fact, share in shares.items()))
    if options.out:
        write_json(options.out, table)


if __name__ == "__main__":
    main()
