"""Score generated characters by a classifier that is trained on real ones.

    python experiments/sprites/classify.py --workdir=runs/sprites --data=data/sprites --guidance=2

A small convolutional network (`sora_jax.evaluate.features`) learns from the clips of the split "train" what a caption
says: skin, hair, clothes, shoes, action and direction. It is then asked about held-out characters, which neither the
network nor the model has seen: about their real clips, about these through the autoencoder, and about clips generated
from their captions.
"""

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from sora_jax.data.storing.manifest import Dataset, caption_of
from sora_jax.evaluate.features import FeaturesConfig, stack, train
from sora_jax.files import write_json
from sora_jax.generate.run import load_run

CAPTION = re.compile(
    r"a pixel-art character with (?P<skin>[^,]+), (?P<hair>[^,]+), (?P<torso>[^,]+), (?P<legs>.+) and "
    r"(?P<shoes>[^,]+), (?P<action>[^,]+), (?P<direction>[^,]+)"
)
COLOURS = ("skin", "hair", "torso", "legs", "shoes")
FACTS = (*COLOURS, "action", "direction")
SEEN = FeaturesConfig(size=64, features=512)


def facts_of(caption: str) -> dict[str, str]:
    """Return what a caption says of each fact."""
    found = CAPTION.fullmatch(caption)
    if not found:
        raise ValueError(f"{caption!r} is no caption of this data set")
    return found.groupdict()


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
    config = dataclasses.replace(SEEN, seed=options.seed)
    x = stack(config, (dataset[row["index"]].frames for row in train_rows))
    classifier = train(config, x, labels_of(train_rows), classes)
    real = [dataset[row["index"]].frames for row in held_out]
    with jax.set_mesh(run.mesh):
        decoded = list(run.autoencoder.decode(run.autoencoder.encode(real)))
    captions, sizes = [caption_of(row) for row in held_out], [clip.shape[:3] for clip in real]
    generated = run.generate(captions, sizes, options.steps, options.guidance, options.seed)
    said = labels_of(held_out)
    table = {
        name: rates(classifier.classify(stack(config, clips)), said)
        for name, clips in {"real": real, "through the autoencoder": decoded, "generated": generated}.items()
    }
    for name, shares in table.items():
        print(f"{name:24} " + ", ".join(f"{fact} {share:.1%}" for fact, share in shares.items()))
    if options.out:
        write_json(options.out, table)


if __name__ == "__main__":
    main()
