"""How fast clips are read: `decode` to the size of a training clip against a bare PyAV loop over the same files.

python experiments/bench/decode.py FOLDER [--rounds=3] [--processes=2] [--most-frames=1000]

The bare loop opens each file, decodes every frame and turns it into an RGB array; ours also finds rotation, time
stamps and damage, resamples in time, scales to at most 256 x 256 pixels and keeps the clip. Both run in so many
processes, one thread each, file by file in turn; the seconds of a side are the sum over files of its fastest round.
"""

import argparse
import time
from multiprocessing import get_context
from pathlib import Path

import timing

from sora_jax.data.fit import SizeRule
from sora_jax.data.reading.media import SpanRule, decode
from sora_jax.data.reading.tracks import MediaError

FIT = SizeRule(16, 256 * 256)
HEADER = ["frames of", "files", "frames", "bare loop, s", "decode, s", "decode, frames/s", "speed against bare"]


def bare(path: str, threads: int = 1) -> int:
    """Turn every frame of the file into an RGB array; return the number of frames."""
    import av

    count = 0
    with av.open(path) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = threads
        for frame in container.decode(stream):
            frame.to_ndarray(format="rgb24")
            count += 1
    return count


def ours(path: str) -> int:
    """Decode the file into a clip; return its number of frames."""
    return len(decode(path, fit=FIT).frames)


def measure(job: tuple[str, int]) -> tuple[str, int, float, float]:
    """Return (path, frames, fastest seconds of the bare loop, of ours), taken in turns."""
    path, rounds = job
    frames, seconds = bare(path), ([], [])
    ours(path)
    for _ in range(rounds):
        for run, taken in zip((bare, ours), seconds, strict=True):
            start = time.perf_counter()
            run(path)
            taken.append(time.perf_counter() - start)
    return path, frames, min(seconds[0]), min(seconds[1])


def usable(job: tuple[str, int]) -> bool:
    """Return True if the whole file is read and has no more than so many frames."""
    path, most = job
    try:
        clip = decode(path, SpanRule(most + 1), FIT)
    except MediaError:
        return False
    return len(clip.frames) <= most and not any(flag.startswith("partial") for flag in clip.flags)


def row(name: str, results: list[tuple[str, int, float, float]]) -> list[str]:
    """Return a row of the table: sums over files and the ratio of their seconds."""
    frames, plain, full = (sum(result[k] for result in results) for k in (1, 2, 3))
    return [name, str(len(results)), str(frames), f"{plain:.2f}", f"{full:.2f}", f"{frames / full:.0f}",
            f"{plain / full:.2f}"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--most-frames", type=int, default=1000, help="longer files are left out")
    parser.add_argument("--each", action="store_true", help="a row for each file")
    options = parser.parse_args()
    machine = timing.machine()
    paths = [str(p) for p in sorted(Path(options.folder).rglob("*")) if p.is_file() and p.suffix != ".csv"]
    with get_context("spawn").Pool(options.processes) as pool:
        jobs = [(path, options.most_frames) for path in paths]
        good = [p for p, fine in zip(paths, pool.map(usable, jobs, chunksize=1), strict=True) if fine]
        results = pool.map(measure, [(path, options.rounds) for path in good], chunksize=1)
    endings = sorted({Path(result[0]).suffix for result in results})
    rows = [row(ending, [r for r in results if Path(r[0]).suffix == ending]) for ending in endings]
    if options.each:
        rows += [row(Path(result[0]).name, [result]) for result in sorted(results, key=lambda r: r[2] / r[3])]
    rows.append(row("all", results))
    print(timing.report(HEADER, rows, f"{len(paths) - len(good)} files are refused, damaged or longer.", machine))


if __name__ == "__main__":
    main()
