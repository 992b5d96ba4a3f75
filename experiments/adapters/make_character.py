"""Make a character that the sprites' model has never seen: a handful of its clips, recoloured, with a name.

    python experiments/adapters/make_character.py --path=lpc_sprites --out=zorp

`lpc_sprites` is the folder of experiments/sprites. The twelve clips of one suit of clothes become clips of Zorp: every
pixel of the figure gets a colour between dark violet and bright cyan by its brightness, which no clip of the data has.
Eight clips are of the split "train", the others, of actions and directions that these do not show, of "test".
"""

import argparse
import csv
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SUIT = {"hair": "spiky pink hair", "top": "chain mail", "bottom": "red trousers", "shoes": "brown shoes"}
DARK, BRIGHT = np.array([45.0, 0.0, 90.0]), np.array([90.0, 255.0, 250.0])
TRAINED = 8


def recolour(image_HW3: np.ndarray) -> np.ndarray:
    """Map the brightness of the figure, all that is not white, onto the two colours."""
    brightness = image_HW3.mean(-1, keepdims=True) / 255.0
    figure = DARK + np.sqrt(brightness) * (BRIGHT - DARK)
    white = (image_HW3 > 250).all(-1, keepdims=True)
    return np.where(white, 255.0, figure).round().astype(np.uint8)


def caption_of(action: str, direction: str) -> str:
    return f"a pixel-art character called zorp, {action}, facing {direction}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, required=True, help="folder of the sprites: a zip and captions.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder for the clips of Zorp")
    options = parser.parse_args()
    with open(options.path / "captions.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row[name] == value for name, value in SUIT.items())]
    options.out.mkdir(parents=True)
    shown: set[tuple[str, str]] = set()
    with (
        zipfile.ZipFile(next(options.path.glob("*.zip"))) as strips,
        open(options.out / "captions.csv", "w", newline="") as table,
    ):
        writer = csv.writer(table)
        writer.writerow(["file", "split", "caption"])
        for number, row in enumerate(rows):
            move = row["action"], row["direction"]
            split = "train" if number < TRAINED or move in shown else "test"
            shown |= {move} if split == "train" else set()
            image = np.asarray(Image.open(io.BytesIO(strips.read(row["file"]))).convert("RGB"))
            name = f"zorp_{number:02d}.png"
            Image.fromarray(recolour(image)).save(options.out / name)
            writer.writerow([name, split, caption_of(*move)])
            print(split, caption_of(*move))


if __name__ == "__main__":
    main()
