"""Packs from a latent cache against reading the same bytes with ArrayRecord alone; the plan; the resume.

    python experiments/bench/feed.py [--clips=20000] [--rounds=7] [--plan-clips=1000000]

A cache of random latents is written to a temporary folder. Its sizes are those of configs/video.py: mixed aspect
ratios of at most 16,384 pixels, 1 to 17 frames, 16 channels, packs of 512 tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
from timing import in_turns, machine, middle_half, milliseconds, report, table

from sora_jax.data.epochs import SECTION
from sora_jax.data.feed import FeedConfig
from sora_jax.data.latents import CacheInfo, LatentCache, add_latent, finish_cache, start_cache
from sora_jax.data.packing import PackingConfig
from sora_jax.data.parts import Share
from sora_jax.data.pipeline import PackedBatches, packed_batches
from sora_jax.data.planning import plan
from sora_jax.data.shards import open_reader
from sora_jax.data.tokenizer import TokenizerConfig, train

CHANNELS, BATCH = 16, 8
PACKING = PackingConfig(length=512, slots=16, text_length=2048, patch=(1, 2, 2))
INFO = CacheInfo("bench", "bench", CHANNELS, (4, 8, 8))
SIZES = [(12, 18), (18, 12), (16, 16), (10, 20), (14, 16), (12, 12), (8, 20)]
STEP = 100_000


def grids_of(count: int) -> np.ndarray:
    """Latent sizes (n, 3): a third pictures, the others of 2 to 5 latent frames."""
    draws = np.random.default_rng(0)
    t = np.where(draws.random(count) < 1 / 3, 1, draws.integers(2, 6, count))
    return np.column_stack([t, np.array(SIZES)[draws.integers(0, len(SIZES), count)]])


def write_cache(path: Path, count: int) -> None:
    grids, draws = grids_of(count), np.random.default_rng(1)
    parts = start_cache(path, INFO, -(-count // 1024))
    for part in parts.missing(Share()):
        with parts.write(part) as writer:
            for n in range(part * 1024, min(count, (part + 1) * 1024)):
                t, h, w = grids[n].tolist()
                row = dict(id=f"clip {n}", variant=0, frames=4 * t - 3, height=8 * h, width=8 * w, fps=8.0, label=-1)
                row |= dict(captions=[f"a caption of clip {n}"], kinds=["original"], weight=1.0, split="train")
                add_latent(writer, INFO, row, draws.standard_normal((t, h, w, CHANNELS), np.float32))
    finish_cache(parts, INFO)


def batches_of(cache: LatentCache, folder: Path | None = None) -> PackedBatches:
    tokenizer = train([], TokenizerConfig(kind="bytes", max_tokens=64))
    return packed_batches(cache, tokenizer, PACKING, BATCH, 0, folder=folder)


def throughput(cache: LatentCache, rounds: int) -> list[list[str]]:
    """Seconds for the same clips: packs, as training gets them, and the bare records in the same order."""
    batches = batches_of(cache)
    steps = batches.report().packs // BATCH
    order = [item for row in range(steps * BATCH) for item in clips_of_row(batches, row)]
    places = list(zip(cache.column("shard").to_numpy()[order], cache.column("record").to_numpy()[order]))
    size = sum(cache[clip].nbytes for clip in order)

    def packs():
        for _ in islice(batches.stream(0, FeedConfig(threads=2)), steps):
            pass

    def one_by_one():
        for step in range(steps):
            batches[step]

    def records():
        readers = {}
        for shard, record in places:
            if shard not in readers:
                name = f"latents-{shard:05d}-of-{cache._latents._count:05d}.array_record"
                readers[shard] = open_reader(cache.path / name)
            readers[shard].read([int(record)])

    alone, threads, plain = in_turns([records, packs, one_by_one], rounds)
    rows = []
    for name, taken in (("ArrayRecord alone", alone), ("packs, two threads", threads), ("packs, no thread", plain)):
        ratios = [a / b for a, b in zip(alone, taken, strict=True)]
        rate = steps * BATCH / median(taken)
        rows.append([name, milliseconds(taken), f"{rate:.0f}", f"{size / median(taken) / 1e6:.0f}"])
        rows[-1] += [f"{median(ratios):.2f}", middle_half(ratios)]
    return rows


def clips_of_row(batches: PackedBatches, row: int) -> list[int]:
    planned, place = batches._epochs.locate(row)
    return planned.clips[planned.plan[place]].tolist()


def plans(count: int) -> list[list[str]]:
    """Fill and speed of planning one section, for several mixes of lengths."""
    draws = np.random.default_rng(0)
    video = grids_of(count)
    ladder = 2 ** draws.integers(4, 9, count)
    mixes = {
        "video as above, L 512": (video[:, 0] * video[:, 1] * video[:, 2] // 4, 512),
        "video as above, L 4096": (video[:, 0] * video[:, 1] * video[:, 2] // 4, 4096),
        "uniform 16 to 1024, L 2048": (draws.integers(16, 1025, count), 2048),
        "powers of two 16 to 256, L 512": (ladder, 512),
        "a picture's 64 and a film's 1344, L 4096": (np.where(draws.random(count) < 0.5, 64, 1344), 4096),
    }
    rows = []
    for name, (lengths, L) in mixes.items():
        text = draws.integers(4, 40, count)
        start = time.perf_counter()
        made = plan(0, 0, lengths, text, L, 64, 64 * 40)
        seconds = time.perf_counter() - start
        fill = lengths.sum() / (len(made) * L)
        rows.append([name, f"{count:,}", f"{seconds:.2f}", f"{count / seconds / 1e6:.2f}", f"{fill:.2%}"])
    return rows


RESUME = """
import json, sys, time
start = time.perf_counter()
sys.path.insert(0, {here!r})
from pathlib import Path
from feed import batches_of, STEP
from sora_jax.data.epochs import Position
from sora_jax.data.feed import FeedConfig
from sora_jax.data.latents import LatentCache
cache, folder, position = json.loads(sys.argv[1])
imported = time.perf_counter()
stream = batches_of(LatentCache(cache), Path(folder)).stream(STEP, FeedConfig(), Position(*position))
next(stream)
print(json.dumps([imported - start, time.perf_counter() - imported]))
"""


def resume(cache: LatentCache, folder: Path, rounds: int) -> list[list[str]]:
    """Seconds to the first batch of step 100,000 in a fresh process, with the position of the checkpoint."""
    batches = batches_of(cache, folder)
    batches.texts.keep()
    position = batches.position(STEP)
    arguments = json.dumps([str(cache.path), str(folder), list(position)])
    command = [sys.executable, "-c", RESUME.format(here=str(Path(__file__).parent)), arguments]
    taken = np.array([json.loads(subprocess.check_output(command)) for _ in range(rounds)])
    epoch = batches.epoch(STEP)
    name = f"{len(cache):,} clips, epoch {epoch}, section {position.section}"
    return [[name, f"{np.median(taken[:, 0]):.2f}", f"{np.median(taken[:, 1]):.2f}", f"{taken[:, 1].max():.2f}"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--plan-clips", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    measured_on = machine()
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder, "cache"), options.clips)
        cache = LatentCache(Path(folder, "cache"))
        speed = throughput(cache, options.rounds)
        again = resume(cache, Path(folder, "captions"), options.rounds)
    header = ["reading", "ms an epoch", "packs a second", "MB a second", "of ArrayRecord", "middle half"]
    planned = table(["lengths", "clips", "seconds", "million clips a second", "fill"], plans(options.plan_clips))
    resumed = table(["first batch of step 100,000", "imports, s", "to the batch, s", "longest, s"], again)
    notes = f"An epoch of more than {SECTION:,} clips is planned in sections of at most that many."
    print(report(header, speed, f"{planned}\n\n{resumed}\n\n{notes}", measured_on))


if __name__ == "__main__":
    main()
