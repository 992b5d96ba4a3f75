"""Compare ways to condition a quickstart run: windows and rolling, history guidance, replacement.

    python experiments/tasks/compare.py --workdir=runs/quickstart --what=long --count=4 --frames=121
    python experiments/tasks/compare.py --workdir=runs/quickstart --what=conditions --count=32

Clips are those of measure.py. Times are seconds of the processor, without the time to compile.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from measure import fresh_clips, identity, seams, turned

from sora_jax.config import from_dict, load
from sora_jax.data.storing.manifest import Dataset
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.evaluate.seams import seam
from sora_jax.generate.long import Windows
from sora_jax.generate.requests import Wanted, plan_requests
from sora_jax.generate.run import Run, load_run
from sora_jax.generate.tasks import Tasks
from sora_jax.parallel.settings import prepare_jax
from sora_jax.quickstart import QuickstartConfig, default_config
from sora_jax.worlds.oracle import read_frames


def guided(sampling: SamplingConfig, scale: float, level: float = 1.0) -> SamplingConfig:
    """Return the sampling with history guidance."""
    return dataclasses.replace(
        sampling, guidance=dataclasses.replace(sampling.guidance, history=scale, history_level=level)
    )


def replacing(sampling: SamplingConfig, resamplings: int) -> SamplingConfig:
    """Return the sampling with replacement."""
    return dataclasses.replace(sampling, condition="replace", resamplings=resamplings)


def compare_long(run: Run, captions: Sequence[str], sizes: Sequence[tuple[int, int]], frames: int) -> None:
    """Sample long clips that turn every second, by each way; print how long their shapes stay, and the time."""
    factor, sampling = run.autoencoder.config.time_factor, run.config.sampling
    latents = 1 + (frames - 1) // factor
    prompts = [" ".join(f"{8 * i}: {turned(c) if i % 2 else c}" for i in range(frames // 8)) for c in captions]
    wanted = Wanted(prompts, [(frames, *size) for size in sizes])
    ways = {
        "windows, 2 of 5 carried": (Windows(latents, 5, 2), sampling),
        "windows, history 1.5": (Windows(latents, 5, 2), guided(sampling, 1.5)),
        "windows, history 1.5 at level 0.8": (Windows(latents, 5, 2), guided(sampling, 1.5, 0.8)),
        "windows, replacement": (Windows(latents, 5, 2), replacing(sampling, 0)),
        "rolling, 2 carried, 2 roll": (Windows(latents, 5, 2, rolls=True), sampling),
        "rolling, 1 carried, 3 roll": (Windows(latents, 5, 1, rolls=True), sampling),
        "rolling, 2 carried, history 1.5": (Windows(latents, 5, 2, rolls=True), guided(sampling, 1.5)),
    }
    for name, (windows, how) in ways.items():
        requests = plan_requests(run.config, run.autoencoder.config, wanted, how)
        clips = []
        for count in (min(latents, 8), latents):  # the first compiles
            start, part = time.process_time(), dataclasses.replace(windows, frames=count)
            clips = [np.concatenate(list(parts)) for parts in run.sample_long(requests, part, how, 3)]
            spent = time.process_time() - start
        shapes = [[frame.shapes for frame in read_frames(clip)] for clip in clips]
        same = np.array([[one == of_clip[0] for one in of_clip] for of_clip in shapes])
        thirds = ", ".join(f"{part.mean():.0%}" for part in np.array_split(same, 3, axis=1))
        motion = np.mean([np.abs(np.diff(clip.astype(np.float32), axis=0)).mean() for clip in clips])
        print(f"{name:36} first shapes {same.mean():.1%}, by thirds {thirds}; change of frames {motion:.2f}; "
              f"{spent:.0f} s of the processor", flush=True)  # fmt: skip


def compare_conditions(run: Run, captions: Sequence[str], clips: Sequence[np.ndarray]) -> None:
    """Extend halves of clips, and animate their first frames, by each way of conditioning; print seams and identity."""
    make, sampling = Tasks(run, context=5), run.config.sampling
    tasks = {
        "extend by 4": ([make.extend(clip[:5], 4) for clip in clips], 5),
        "image to video": ([make.animate(clip[:1], 9) for clip in clips], 1),
    }
    ways = {
        "given rows at 0": sampling,
        "history 1.5": guided(sampling, 1.5),
        "history 1.5 at level 0.8": guided(sampling, 1.5, 0.8),
        "history 3": guided(sampling, 3.0),
        "replacement": replacing(sampling, 0),
        "replacement, 4 resamplings": replacing(sampling, 4),
    }
    for task, (asked, join) in tasks.items():
        for way, how in ways.items():
            made = run.generate(captions, tasks=asked, seed=1, sampling=how)
            seams(f"{task}, {way}", [seam(clip, join) for clip in made])
            identity(f"{task}, {way}", captions, made, clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--config", default=None, help="of the quickstart run (default: its full form)")
    parser.add_argument("--what", choices=("long", "conditions"), default="long")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--frames", type=int, default=121, help="of the long clips")
    options = parser.parse_args()
    prepare_jax()
    config = from_dict(QuickstartConfig, load(options.config or default_config()))
    seen = {caption for row in Dataset(options.workdir / "world").rows() for caption in row["captions"]}
    pairs = [pair for pair in fresh_clips(config.world, seen, 4 * options.count) if len(pair[1]) == 9]
    captions, clips = zip(*pairs[: options.count], strict=True)
    run = load_run(options.workdir / "transformer")
    if options.what == "long":
        compare_long(run, captions, [clip.shape[1:3] for clip in clips], options.frames)
    else:
        compare_conditions(run, captions, clips)


if __name__ == "__main__":
    main()
