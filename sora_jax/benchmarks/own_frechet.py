"""Frechet distances by features that are learnt from the captions of a world's own clips."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from sora_jax import console
from sora_jax.evaluate.features import Classifier, FeaturesConfig, load, read_facts, save, stack, train
from sora_jax.evaluate.frechet import Distance, Sample, measure_distance
from sora_jax.worlds.table import AnyWorld, captions_of, draw

FILE = "own_features.safetensors"


def world_features(world: AnyWorld, first: int, folder: Path, config: FeaturesConfig = FeaturesConfig()) -> Classifier:
    """Return a classifier of the words of captions, which sees frames of a world's training clips from `first` on.

    It is kept in `folder`, so that distances measured later compare.
    """
    path = folder / FILE
    if not path.exists():
        console.log(f"features: a classifier of what clips show is trained, once, in {config.steps} steps")
        captions = [list(captions_of(world, index).values()) for index in range(config.clips)]
        facts, classes = read_facts([{"label": -1, "captions": texts} for texts in captions])
        with jax.set_mesh(None):
            seen = stack(config, (draw(world, index)[first:] for index in range(config.clips)))
            save(train(config, seen, facts, classes), path)
    return load(path)


def distances(
    classifier: Classifier, real: Sequence[np.ndarray], others: Mapping[str, Sequence[np.ndarray]]
) -> dict[str, Distance]:
    """Return the Frechet distances of sets of clips, uint8 (T, H, W, 3), from the real ones."""

    def features(clips: Sequence[np.ndarray]) -> Sample:
        return Sample(np.stack(list(classifier.features(clips))), np.arange(len(clips)))

    true = features(real)
    return {name: measure_distance(true, features(clips)) for name, clips in others.items()}
