"""Makes a TFDS data set with class labels, without TensorFlow, from files that many people have.

    python experiments/images/make_tfds.py digits FOLDER tfds         FOLDER has MNIST's t10k-*-ubyte.gz
    python experiments/images/make_tfds.py flowers FOLDER tfds        FOLDER has captions.csv and a zip of its pictures
    TFDS_DATA_DIR=tfds sora-jax data build --source=tfds:digits --out=data/digits --multiple=4

`digits` has 28 x 28 grey pictures of ten classes, `flowers` photographs of any size of five.
"""

import argparse
import csv
import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class _Labelled(tfds.core.GeneratorBasedBuilder):
    """Pictures (PNG or JPEG, as bytes) and a class; `examples` yields (split, picture, class)."""

    VERSION = tfds.core.Version("1.0.0")
    skip_registration = True
    folder: Path
    names: list[str]
    shape: tuple = (None, None, 3)

    def _info(self):
        features = {"image": tfds.features.Image(shape=self.shape), "label": tfds.features.ClassLabel(names=self.names)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split):
        for number, (of, picture, label) in enumerate(self.examples()):
            if of == split:
                yield number, {"image": io.BytesIO(picture), "label": label}


class Digits(_Labelled):
    names = [str(digit) for digit in range(10)]
    shape = (28, 28, 1)

    def examples(self):
        """The ten thousand digits; every twentieth is of the test split."""
        with gzip.open(self.folder / "t10k-images-idx3-ubyte.gz") as images:
            pictures = np.frombuffer(images.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(self.folder / "t10k-labels-idx1-ubyte.gz") as labels:
            classes = np.frombuffer(labels.read(), np.uint8, offset=8)
        for number, (picture, label) in enumerate(zip(pictures, classes, strict=True)):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "png")
            yield "test" if number % 20 == 0 else "train", file.getvalue(), int(label)


class Flowers(_Labelled):
    names = ["daisy", "dandelion", "roses", "sunflowers", "tulips"]

    def examples(self):
        """The photographs, in the splits of the table."""
        with open(self.folder / "captions.csv", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
        (archive,) = self.folder.glob("*.zip")
        with zipfile.ZipFile(archive) as pictures:
            for row in rows:
                yield "train" if row["split"] == "train" else "test", pictures.read(row["file"]), row["label"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["digits", "flowers"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, help="TFDS data directory to write")
    options = parser.parse_args()
    builder = {"digits": Digits, "flowers": Flowers}[options.name]
    builder.folder = options.folder
    made = builder(data_dir=str(options.out), file_format="array_record")
    made.download_and_prepare()
    print({name: split.num_examples for name, split in made.info.splits.items()})
