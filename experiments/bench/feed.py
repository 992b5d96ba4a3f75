"""Packs from a latent cache against reading the same bytes with ArrayRecord alone; the plan; the resume; the memory.

    python experiments/bench/feed.py [--clips=20000] [--plan-clips=1000000] [--rounds=7] [--quick]

Caches of random latents are written to a temporary folder. "small": the sizes of configs/video.py, mixed aspect ratios
of at most 16,384 pixels, 1 to 17 frames, packs of 512 tokens. "large": twice the sides, three times the frames, packs
of 8,192 tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from timing import in_turns, machine, middle_half, report, table

from sora_jax.data.feeding.feed import FeedConfig
from sora_jax.data.feeding.pipeline import PackedBatches
from sora_jax.data.feeding.tokenizer import TokenizerConfig, train
from sora_jax.data.packing.packs import PackingConfig
from sora_jax.data.packing.planning import plan
from sora_jax.data.storing.latents import COLUMNS, CacheInfo, LatentCache, add_latent, finish_cache, start_cache
from sora_jax.data.storing.shards import open_reader

CHANNELS, BATCH = 16, 8
SMALL = PackingConfig(length=512, slots=16, text_length=2048, patch=(1, 2, 2))
LARGE = replace(SMALL, length=8192, slots=64, text_length=4096)
INFO = CacheInfo("bench", "bench", CHANNELS, (4, 8, 8))
SIZES = [(12, 18), (18, 12), (16, 16), (10, 20), (14, 16), (12, 12), (8, 20)]
FEEDS = {
    "packs, no thread": FeedConfig(threads=0),
    "packs, two threads": FeedConfig(threads=2, ahead=8),
    "packs, two worker processes": FeedConfig(workers=2, threads=1, ahead=8),
}


def grids_of(count: int, large: bool = False) -> np.ndarray:
    """Latent sizes (n, 3): a third pictures, the others of 2 to 5 latent frames (three times as many, if large)."""
    draws = np.random.default_rng(0)
    t = np.where(draws.random(count) < 1 / 3, 1, draws.integers(2, 6, count) * (3 if large else 1))
    return np.column_stack([t, np.array(SIZES)[draws.integers(0, len(SIZES), count)] * (2 if large else 1)])


def write_cache(path: Path, count: int, large: bool = False) -> LatentCache:
    grids, draws = grids_of(count, large), np.random.default_rng(1)
    parts = start_cache(path, INFO, -(-count // 1024))
    for part in parts.missing():
        with parts.write(part) as writer:
            for n in range(part * 1024, min(count, (part + 1) * 1024)):
                t, h, w = grids[n].tolist()
                row = dict(id=f"clip {n}", variant=0, frames=4 * t - 3, height=8 * h, width=8 * w, fps=8.0, label=-1)
                row |= dict(captions=[f"a caption of clip {n}"], kinds=["original"], weight=1.0, split="train")
                add_latent(writer, INFO, row, draws.standard_normal((t, h, w, CHANNELS), np.float32))
    finish_cache(parts, INFO)
    return LatentCache(path)


def batches_of(cache: LatentCache, packing: PackingConfig = SMALL, folder: Path | None = None) -> PackedBatches:
    tokenizer = train([], TokenizerConfig(kind="bytes", max_tokens=64))
    return PackedBatches(cache, tokenizer, packing, BATCH, 0, folder=folder)


def throughput(name: str, cache: LatentCache, packing: PackingConfig, rounds: int) -> list[list[str]]:
    """Seconds for the packs of an epoch, and for the bare records of the same clips in the same order."""
    batches = batches_of(cache, packing)
    steps = batches.report().packs // BATCH
    order = [clip for row in range(steps * BATCH) for clip in batches.clips(row)]
    shards, records = cache.column("shard").to_numpy()[order], cache.column("record").to_numpy()[order]
    places = list(zip(shards.tolist(), records.tolist()))
    paths = sorted(cache.path.glob("latents-*.array_record"))
    readers = [open_reader(path) for path in paths]
    size = sum(readers[shard].read([record])[0].__len__() for shard, record in places)

    def alone():
        for shard, record in places:
            readers[shard].read([record])

    streams = [batches.stream(0, feed) for feed in FEEDS.values()]
    runs = [alone, *(lambda stream=stream: [None for _ in islice(stream, steps)] for stream in streams)]
    base, *others = in_turns(runs, rounds)
    rows = []
    for label, taken in zip(("ArrayRecord alone", *FEEDS), (base, *others)):
        ratios = [a / b for a, b in zip(base, taken, strict=True)]
        speed = [f"{steps * BATCH / median(taken):.0f}", f"{size / median(taken) / 1e6:.0f}"]
        rows.append([name, label, *speed, f"{median(ratios):.2f}", middle_half(ratios)])
    return rows


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
        made = plan(0, 0, lengths, text, PackingConfig(L, 64, 64 * 40))
        seconds = time.perf_counter() - start
        fill = lengths.sum() / (len(made) * L)
        rows.append([name, f"{count:,}", f"{seconds:.2f}", f"{count / seconds / 1e6:.2f}", f"{fill:.2%}"])
    return rows


RESUME = """
import json, sys, time
start = time.perf_counter()
sys.path.insert(0, {here!r})
from pathlib import Path
from feed import batches_of
from sora_jax.data.feeding.epochs import Position
from sora_jax.data.feeding.feed import FeedConfig
from sora_jax.data.storing.latents import LatentCache
import grain
cache, folder, step, position = json.loads(sys.argv[1])
imported = time.perf_counter()
batches = batches_of(LatentCache(cache), folder=Path(folder))
next(batches.stream(step, FeedConfig(), Position(*position)))
print(json.dumps([imported - start, time.perf_counter() - imported]))
"""


def resume(cache: LatentCache, folder: Path, step: int, rounds: int) -> list[list[str]]:
    """Seconds to the first batch of a step in a fresh process, with the position of the checkpoint."""
    batches = batches_of(cache, folder=folder)
    batches.captions.flush()
    position = batches.position(step)
    arguments = json.dumps([str(cache.path), str(folder), step, list(position)])
    command = [sys.executable, "-c", RESUME.format(here=str(Path(__file__).parent)), arguments]
    taken = np.array([json.loads(subprocess.check_output(command)) for _ in range(rounds)])
    name = f"step {step:,} of {len(cache):,} clips, epoch {batches.epoch(step)}"
    return [[name, f"{np.median(taken[:, 0]):.2f}", f"{np.median(taken[:, 1]):.2f}", f"{taken[:, 1].max():.2f}"]]


MEMORY = """
import json, re, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from feed import SMALL, batches_of
from sora_jax.data.feeding.pipeline import PackedBatches
from sora_jax.data.feeding.tokenizer import NoText
from sora_jax.data.storing.latents import LatentCache
import pyarrow.compute, pyarrow.parquet
def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
cache, folder = json.loads(sys.argv[1])
before = memory('VmRSS')
batches = batches_of(LatentCache(cache), folder=Path(folder)) if folder else PackedBatches(
    LatentCache(cache), NoText(), SMALL, 8, 0)
batches.captions.flush()
batches.clips(0)
pyarrow.default_memory_pool().release_unused()
print(json.dumps([memory('VmRSS') - before, memory('VmHWM') - before]))
"""


def write_columns(path: Path, count: int) -> None:
    """Write the manifest of a cache without its latents."""
    path.mkdir()
    info = INFO.header() | {"parts": 1, "clips": count, "digest": ""}
    (path / "cache.json").write_text(json.dumps(info))
    schema = pa.schema([("shard", pa.int32()), ("record", pa.int32())])
    types = {"string": pa.string(), "string[]": pa.list_(pa.string()), "int32[]": pa.list_(pa.int32())}
    for name, kind in COLUMNS.items():
        schema = schema.append(pa.field(name, types.get(kind) or pa.type_for_alias(kind)))
    with pq.ParquetWriter(path / "manifest.parquet", schema) as writer:
        for start in range(0, count, 1 << 18):
            n = np.arange(start, min(count, start + (1 << 18)))
            t, h, w = grids_of(len(n)).T
            same = dict(variant=0, shard=0, fps=8.0, kinds=["original"], text_tokens=[], label=-1, weight=1.0)
            columns = {name: pa.array([value] * len(n)) for name, value in (same | {"split": "train"}).items()}
            columns |= dict(uid=n + 1, t=t, h=h, w=w, frames=4 * t - 3, height=8 * h, width=8 * w, record=n)
            columns |= dict(id=[f"{i:016x}" for i in n], captions=[[f"a picture of number {i:,} in rain"] for i in n])
            arrays = [pa.array(columns[field.name]).cast(field.type) for field in schema]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def memory(folder: Path, count: int) -> list[list[str]]:
    """Bytes of a clip, held and at the peak, from a fresh process to the first plan of a section."""
    write_columns(folder / "columns", count)
    rows = []
    for name, tokens in (
        ("no captions", ""),
        ("first start", str(folder / "ids")),
        ("next start", str(folder / "ids")),
    ):
        arguments = json.dumps([str(folder / "columns"), tokens])
        command = [sys.executable, "-c", MEMORY.format(here=str(Path(__file__).parent)), arguments]
        held, peak = json.loads(subprocess.check_output(command))
        rows.append([name, f"{count:,}", f"{held / count:.0f}", f"{peak / count:.0f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--plan-clips", type=int, default=1_000_000)
    parser.add_argument("--step", type=int, default=100_000, help="where to resume")
    parser.add_argument("--column-clips", type=int, default=10_000_000, help="in memory")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the same in a tiny form, which says nothing about speed")
    options = parser.parse_args()
    if options.quick:
        options.clips, options.plan_clips, options.step, options.rounds = 600, 5_000, 500, 1
        options.column_clips = 5_000
    measured_on = machine()
    with tempfile.TemporaryDirectory() as folder:
        small = write_cache(Path(folder, "small"), options.clips)
        large = write_cache(Path(folder, "large"), options.clips // 10, large=True)
        speed = throughput("small", small, SMALL, options.rounds) + throughput("large", large, LARGE, options.rounds)
        held = memory(Path(folder), options.column_clips)
        again = resume(small, Path(folder, "captions"), options.step, options.rounds)
    header = ["latents", "reading", "packs a second", "MB a second", "of ArrayRecord", "middle half"]
    planned = table(["lengths", "clips", "seconds", "million clips a second", "fill"], plans(options.plan_clips))
    columns = table(["captions", "clips", "bytes a clip", "at the peak"], held)
    resumed = table(["first batch", "imports, s", "to the batch, s", "longest, s"], again)
    notes = "Medians of rounds in turn. ArrayRecord alone reads in one thread and drops what it reads."
    print(report(header, speed, f"{notes}\n\n{planned}\n\n{resumed}\n\n{columns}", measured_on))


if __name__ == "__main__":
    main()
