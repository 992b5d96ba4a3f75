"""Measure what chunks and tiles cost: peak memory against a clip's length, and one program for clips of many sizes.

    python experiments/autoencoder/stream.py --what=memory     decode 17, 65 and 257 frames, each in its own process
    python experiments/autoencoder/stream.py --what=programs   encode 50 clips of 30 sizes, compilation included

The network is that of configs/video_autoencoder.py:s_4x8x8 with random weights: memory and time do not depend on them.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from sora_jax.config import load
from sora_jax.kinds import run_config
from sora_jax.models.first_stage import autoencoder_specs
from sora_jax.models.tiling import TilingConfig, choose_tile
from sora_jax.nn.params import init
from sora_jax.train import frozen, streaming
from sora_jax.train.frozen import FrozenAutoencoder

CONFIG = Path(__file__).parents[2] / "configs" / "video_autoencoder.py"
FRAMES = (17, 65, 257)
SIDE = 128
CLIPS, SIZES = 50, 30


def autoencoder() -> FrozenAutoencoder:
    """Return the network with random weights."""
    model = run_config(load(f"{CONFIG}:s_4x8x8")).model
    params = init(autoencoder_specs(model), jax.random.key(0))
    return FrozenAutoencoder(model, params, np.zeros(16, np.float32), np.ones(16, np.float32))


def decode(frames: int, whole: bool) -> None:
    """Decode one clip in this process and print the peak of its memory and the seconds of a second run."""
    network = autoencoder()
    z = np.random.default_rng(0).standard_normal((1 + (frames - 1) // 4, SIDE // 8, SIDE // 8, 16)).astype(np.float32)
    for _ in range(2):
        start = time.perf_counter()
        parts = [next(network.decode([z]))] if whole else network.decode_chunks(z)
        count = sum(len(part) for part in parts)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{'whole' if whole else 'chunks':8} {count:4} frames   peak {peak:7.0f} MiB   {seconds:6.2f} s")


def memory() -> None:
    """Decode clips of several lengths, each in a process of its own."""
    for options in ([], ["--whole"]):
        for frames in FRAMES:
            subprocess.run([sys.executable, __file__, f"--frames={frames}", *options], check=True)


def programs() -> None:
    """Encode clips of many sizes by one program and by one for each size."""
    rng = np.random.default_rng(0)
    drawn = [(1 + 4 * int(t), 8 * int(h), 8 * int(w)) for t, h, w in rng.integers((0, 4, 4), (5, 13, 13), (200, 3))]
    sizes = sorted(set(drawn))[:: max(len(set(drawn)) // SIZES, 1)][:SIZES]
    clips = [rng.integers(0, 256, (*sizes[i % SIZES], 3), np.uint8) for i in range(CLIPS)]
    clips.sort(key=lambda clip: clip.shape)
    counts = {size: sum(clip.shape[:3] == size for clip in clips) for size in sizes}
    network = autoencoder()
    for name, tiles in (("one program", choose_tile(network.config, counts)), ("one a size", TilingConfig())):
        start = time.perf_counter()
        found = list(network.encode(clips, 4, tiles=tiles))
        seconds = time.perf_counter() - start
        compiled = (streaming._encode_chunk if tiles else frozen._encode)._cache_size()
        start = time.perf_counter()
        list(network.encode(clips, 4, tiles=tiles))
        again = time.perf_counter() - start
        done = f"{len(found)} clips of {len(sizes)} sizes: {compiled} programs"
        print(f"{name:12} {done}, {seconds:.1f} s, again {again:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("memory", "programs"))
    parser.add_argument("--frames", type=int, help="decode one clip of so many frames in this process")
    parser.add_argument("--whole", action="store_true", help="with --frames: at once, not in chunks")
    options = parser.parse_args()
    if options.frames:
        decode(options.frames, options.whole)
    else:
        {"memory": memory, "programs": programs}[options.what or "memory"]()


if __name__ == "__main__":
    main()
