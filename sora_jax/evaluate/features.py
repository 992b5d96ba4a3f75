"""Learn features for a dataset where no published network fits: a small classifier of what its captions or labels say.

The network sees a few frames of a clip, small, stacked into channels, and tells the class of each *fact*: the label,
and for each word of the captions if a caption has it. Its last hidden layer is the feature vector. Training takes a
minute on two cores, has a fixed seed, and its result is kept in the dataset folder: distances of several runs compare.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sora_jax.config import check, from_dict, to_dict
from sora_jax.console import progress
from sora_jax.data.storing.manifest import Dataset, evenly_spread
from sora_jax.errors import UserError
from sora_jax.evaluate.embed import embed, resize
from sora_jax.files import as_path, local_copy, replacing
from sora_jax.nn.images import conv2d, conv2d_specs, group_norm, group_norm_specs
from sora_jax.nn.layers import dense, dense_specs
from sora_jax.nn.params import init
from sora_jax.parallel.rules import out_sharding

Facts = Mapping[str, np.ndarray]  # class of each clip (n,) int, by the name of the fact
MOST_WORDS = 256  # the most frequent ones
RARE = 0.01  # of the captions: words that fewer have, or that fewer lack, are not learnt
SHIFT = 2  # pixels by which training clips are moved
GROUPS = 8  # of channels, in group normalisation


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """Choose the network and its training."""

    frames: int = 5  # of a clip, evenly spread from the first to the last
    size: int = 32  # pixels of a side, to which frames are resized
    widths: tuple[int, ...] = (32, 64, 96, 128)  # channels of the convolutions, each of which halves the picture
    features: int = 64  # values of the last hidden layer
    clips: int = 4096  # of the training split, at most, evenly spread
    steps: int = 1000  # of the optimizer
    batch: int = 64  # clips of a step
    learning_rate: float = 2e-3  # at the start, then along a cosine to 0
    seed: int = 0  # of initial weights, batches and disturbances

    def __post_init__(self):
        for name in ("frames", "size", "features", "clips", "steps", "batch"):
            check(getattr(self, name) > 0, f"--own.{name} is {getattr(self, name)}; it must be positive")
        wide = f"--own.widths is {self.widths}; each must be a positive multiple of {GROUPS}"
        check(self.widths and all(width > 0 and width % GROUPS == 0 for width in self.widths), wide)
        blocks = 2 ** len(self.widths)
        check(self.size % blocks == 0, f"--own.size is {self.size}; it must be a multiple of {blocks}")
        check(self.learning_rate > 0, f"--own.learning_rate is {self.learning_rate}; it must be positive")


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Hold a trained network."""

    config: FeaturesConfig
    classes: dict[str, int]  # number of classes of each fact
    params: dict

    @property
    def digest(self) -> str:
        """Return eight hex digits of the weights: distances compare where they are equal."""
        values = (np.ascontiguousarray(value).tobytes() for value in jax.tree.leaves(self.params))
        return hashlib.sha256(b"".join(values)).hexdigest()[:8]

    @property
    def text(self) -> str:
        """Name every choice."""
        c = self.config
        seen = f"{c.frames} frames, evenly spread, bilinear-antialias to {c.size} x {c.size}"
        return f"{seen}, {c.features} features of the classifier {self.digest}"

    def features(self, clips: Iterable[np.ndarray], batch: int = 64) -> Iterator[np.ndarray]:
        """Yield the features (config.features,) of uint8 clips (T, H, W, 3) of any sizes, in order."""
        chosen = (choose_frames(self.config, clip) for clip in clips)
        return embed(functools.partial(_features, self.config), self.params, chosen, batch)

    def classify(self, stacked: np.ndarray) -> dict[str, np.ndarray]:
        """Return the class of each fact of stacked frames (n, size, size, 3 frames), as `stack` makes them."""
        found = np.concatenate([_logits(self.params, stacked[i : i + 256]) for i in range(0, len(stacked), 256)])
        ends = np.cumsum(list(self.classes.values()))[:-1]
        return {name: part.argmax(1) for name, part in zip(self.classes, np.split(found, ends, axis=1), strict=True)}


def specs(config: FeaturesConfig, classes: Mapping[str, int]) -> dict:
    """Declare the parameters of the network."""
    widths = (3 * config.frames, *config.widths)
    side = config.size // 2 ** len(config.widths)
    convs = [{"conv": conv2d_specs(i, o), "norm": group_norm_specs(o)} for i, o in zip(widths[:-1], widths[1:])]
    hidden = dense_specs(side * side * widths[-1], config.features, (None, None))
    return {
        "convs": convs,
        "hidden": hidden,
        "facts": dense_specs(config.features, sum(classes.values()), (None, None)),
    }


def features(params: dict, frames_BHWD: jax.Array) -> jax.Array:
    """Return the last hidden layer (B, features), before its ReLU, of stacked frames in [-1, 1]."""
    x = frames_BHWD
    for layer in params["convs"]:
        x = jax.nn.relu(group_norm(layer["norm"], conv2d(layer["conv"], x, stride=2), GROUPS))
    return dense(params["hidden"], _rows(x), ("batch", None))


def logits(params: dict, frames_BHWD: jax.Array) -> jax.Array:
    """Return the logits (B, classes) of all facts, one after the other."""
    return dense(params["facts"], jax.nn.relu(features(params, frames_BHWD)), ("batch", None))


def _rows(x: jax.Array) -> jax.Array:
    return jnp.reshape(x, (len(x), -1), out_sharding=out_sharding("batch", None))


def choose_frames(config: FeaturesConfig, clip: np.ndarray) -> np.ndarray:
    """Return frames of a clip that are evenly spread; those of a shorter clip are repeated."""
    return clip[np.linspace(0, len(clip) - 1, config.frames).round().astype(int)]


@functools.partial(jax.jit, static_argnums=0)
def _stacked(config: FeaturesConfig, _: dict, clips_BTHWC: jax.Array) -> jax.Array:
    """Resize chosen frames of uint8 clips and stack them into channels: (B, size, size, 3 frames) in [-1, 1]."""
    x = resize(clips_BTHWC, (config.size,) * 2, "bilinear-antialias") / 127.5 - 1
    shape = (len(x), config.size, config.size, 3 * config.frames)
    return jnp.reshape(jnp.moveaxis(x, 1, 3), shape, out_sharding=out_sharding("batch", None, None, None))


@functools.partial(jax.jit, static_argnums=0)
def _features(config: FeaturesConfig, params: dict, clips_BTHWC: jax.Array) -> jax.Array:
    return features(params, _stacked(config, {}, clips_BTHWC))


_logits = jax.jit(logits)


def stack(config: FeaturesConfig, clips: Iterable[np.ndarray]) -> np.ndarray:
    """Return what the network sees of uint8 clips: (n, size, size, 3 frames) in [-1, 1]."""
    chosen = (choose_frames(config, clip) for clip in clips)
    return np.stack(list(embed(functools.partial(_stacked, config), {}, chosen, 64)))


def train(config: FeaturesConfig, x: np.ndarray, facts: Facts, classes: dict[str, int]) -> Classifier:
    """Train a classifier on stacked frames; `facts` holds the class of each clip, `classes` their number, by fact."""
    labels = np.stack([facts[name] for name in classes], axis=1)
    optimizer = optax.adamw(optax.cosine_decay_schedule(config.learning_rate, config.steps), weight_decay=1e-2)
    params = init(specs(config, classes), jax.random.key(config.seed))
    state = optimizer.init(params)
    fact_of = np.repeat(np.arange(len(classes)), list(classes.values()))  # of each logit
    first = np.cumsum([0, *classes.values()])[:-1]  # logit of each fact

    @jax.jit
    def step(params, state, x, chosen, key):
        def loss(params):
            z = logits(params, disturb(key, x)).T
            top = jax.lax.stop_gradient(jax.ops.segment_max(z, fact_of, len(classes)))
            total = jax.ops.segment_sum(jnp.exp(z - top[fact_of]), fact_of, len(classes))
            return (top + jnp.log(total) - jnp.take_along_axis(z, chosen.T, 0)).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    rng, key = np.random.default_rng(config.seed), jax.random.key(config.seed)
    for number in progress(range(config.steps), desc="features", unit="step"):
        rows = rng.choice(len(x), config.batch, replace=len(x) < config.batch)
        params, state = step(params, state, x[rows], first + labels[rows], jax.random.fold_in(key, number))
    return Classifier(config, classes, jax.device_get(params))


def disturb(key: jax.Array, x: jax.Array) -> jax.Array:
    """Move a batch by up to SHIFT pixels and add noise, so that the classifier depends on no single pixel."""
    where, noise, size = jax.random.split(key, 3)
    offset = jax.random.randint(where, (2,), -SHIFT, SHIFT + 1, jnp.int32)
    scale = 0.15 * jax.random.uniform(size, (), jnp.float32)
    return jnp.roll(x, offset, (1, 2)) + scale * jax.random.normal(noise, x.shape, jnp.float32)


def read_facts(rows: Sequence[dict]) -> tuple[Facts, dict[str, int]]:
    """Return what the rows of a manifest say: labels, and for each word if the first caption has it."""
    facts, classes = {}, {}
    labels = np.array([row["label"] for row in rows])
    if len(rows) and labels.min() >= 0 and len(set(labels.tolist())) > 1:
        facts["label"], classes["label"] = labels, int(labels.max()) + 1
    captions = [set(re.findall(r"[\w-]+", row["captions"][0].lower())) if row["captions"] else set() for row in rows]
    counts = Counter(word for words in captions for word in words)
    least = max(RARE * len(rows), 1)
    for word in sorted(counts, key=lambda word: (-counts[word], word))[:MOST_WORDS]:
        if least <= counts[word] <= len(rows) - least:
            facts[f"word {word}"] = np.array([word in words for words in captions], int)
            classes[f"word {word}"] = 2
    return facts, classes


def own_features(dataset: Dataset, config: FeaturesConfig = FeaturesConfig()) -> Classifier:
    """Return the classifier that a dataset folder keeps for a config; train and keep it where there is none.

    It is trained on one device, also where a mesh is set.

    Raises:
        UserError: the clips have neither labels nor captions, or the folder cannot be written.
    """
    path = kept_at(dataset, config)
    if not path.exists():
        rows, facts, classes = learnable(dataset, config)
        with jax.set_mesh(None):
            x = stack(config, (dataset[row["index"]].frames for row in rows))
            save(train(config, x, facts, classes), path)
    return load(path)


def kept_at(dataset: Dataset, config: FeaturesConfig) -> Path:
    """Return the file of a classifier; its name depends on the clips and the config."""
    record = {"config": to_dict(config), "data": dataset.digest}
    name = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    return as_path(dataset.path) / f"own_features_{name}.safetensors"


def learnable(dataset: Dataset, config: FeaturesConfig) -> tuple[list[dict], Facts, dict[str, int]]:
    """Return rows to train on, with their facts and classes; UserError if they do not differ in any."""
    rows = evenly_spread(dataset.rows("train") or dataset.rows(), config.clips)
    facts, classes = read_facts(rows)
    wanted = "it must have clips that differ in their labels or in the words of their captions"
    check(classes, f"--data is {str(dataset.path)!r}; to learn features from, {wanted}")
    return rows, facts, classes


def save(classifier: Classifier, path: Path) -> None:
    """Write a classifier as safetensors, its config in the metadata."""
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(value) for name, value in _named(classifier.params)}
    metadata = {"config": json.dumps(to_dict(classifier.config)), "classes": json.dumps(classifier.classes)}
    with replacing(path) as temporary:
        save_file(arrays, temporary, metadata)


def load(path: Path) -> Classifier:
    """Read a classifier; UserError if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(local_copy(path), framework="numpy") as file:
            config = from_dict(FeaturesConfig, json.loads(file.metadata()["config"]))
            classes = json.loads(file.metadata()["classes"])
            wanted = specs(config, classes)
            arrays = [file.get_tensor(name) for name, _ in _named(wanted)]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}; remove it, it is made again") from error
    return Classifier(config, classes, jax.tree.unflatten(jax.tree.structure(wanted), arrays))


def _named(tree: dict) -> list[tuple[str, Any]]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), value) for path, value in paths]
