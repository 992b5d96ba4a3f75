"""Measure the tasks of a quickstart run: seams, closures, identity, prompts in time, a long clip.

    python experiments/tasks/measure.py --workdir=runs/quickstart --count=32 --out=experiments/tasks

Clips are fresh clips of the world (experiments/quickstart/score_fresh.py). Prints a table, and writes a strip of frames
of one clip of every task to tasks.png in the folder --out.
"""

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from score_fresh import fresh_clips

from sora_jax.config import from_dict, load
from sora_jax.data.storing.manifest import Dataset
from sora_jax.data.viewing.sheets import strip
from sora_jax.data.viewing.write import save_png
from sora_jax.evaluate.seams import Seam, closure, seam
from sora_jax.generate.long import windows_of
from sora_jax.generate.requests import Wanted, plan_requests
from sora_jax.generate.run import Run, load_run
from sora_jax.generate.tasks import Tasks, pad
from sora_jax.quickstart import QuickstartConfig, default_config
from sora_jax.worlds.oracle import agreement, read_frames

TURNED = {"left": "right", "right": "left", "up": "down", "down": "up"}
SHOWN = 17  # frames of a strip


def summary(values: Sequence[float]) -> str:
    """Return median and 95 % point."""
    there = np.array([value for value in values if not np.isnan(value)])
    return f"median {np.median(there):.2f}, 95 % {np.quantile(there, 0.95):.2f} ({len(there)} clips)"


def seams(name: str, found: Sequence[Seam]) -> None:
    """Print the seam ratios of clips."""
    motion = np.mean([one.motion for one in found])
    print(f"{name:34} ratio {summary([s.ratio for s in found])}; quarter {summary([s.quarter for s in found])}; "
          f"jolt {summary([s.jolt for s in found])}; motion {motion:.2f}", flush=True)  # fmt: skip


def identity(name: str, captions: Sequence[str], clips: Sequence[np.ndarray], firsts: Sequence[np.ndarray]) -> None:
    """Print how often kind and colour are those of the prompt, and how many frames show the shapes of the first."""
    right = [agreement(caption, clip) for caption, clip in zip(captions, clips, strict=True)]
    kept = [a.kind is not False and a.colour is not False for a in right]
    same = []
    for first, clip in zip(firsts, clips, strict=True):
        wanted = read_frames(first)[0].shapes
        same.append(np.mean([frame.shapes == wanted for frame in read_frames(clip)]))
    print(f"{name:34} kind and colour {np.mean(kept):.1%}; frames with the shapes of the first {np.mean(same):.1%}; "
          f"motion {np.mean([a.motion is not False for a in right]):.1%}", flush=True)  # fmt: skip


def turned(caption: str) -> str:
    """Return a caption whose shape moves the other way."""
    return " ".join(TURNED.get(word, word) for word in caption.split())


def long_clip(run: Run, caption: str, size: tuple[int, int], frames: int) -> np.ndarray:
    """Sample a long clip that turns every second, and print what it costs and how long its shape stays."""
    spans = " ".join(f"{8 * i}: {turned(caption) if i % 2 else caption}" for i in range(frames // 8))
    sampling = run.config.sampling
    clips = {}
    for count in (33, frames):
        start = time.time()
        requests = plan_requests(
            run.config, run.autoencoder.config, Wanted([spans], (count, *size), clip_ids=[1]), sampling
        )
        (parts,) = run.sample_long(requests, windows_of(count, 9, 4, run.autoencoder.config.time_factor), sampling, 3)
        clips[count] = np.concatenate(list(parts))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"long: {count} frames in {time.time() - start:.0f} s; peak memory so far {peak:.2f} GiB", flush=True)
    wanted = read_frames(clips[frames][:1])[0].shapes
    same = [frame.shapes == wanted for frame in read_frames(clips[frames])]
    seconds = [f"{np.mean(same[s : s + 80]):.0%}" for s in range(0, frames - 1, 80)]
    print(f"long: frames with the first shapes, by ten seconds: {', '.join(seconds)}", flush=True)
    return clips[frames]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--config", default=None, help="of the quickstart run (default: its full form)")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--frames", type=int, default=481, help="of the long clip")
    parser.add_argument("--out", type=Path, default=Path("experiments/tasks"))
    options = parser.parse_args()
    config = from_dict(QuickstartConfig, load(options.config or default_config()))
    seen = {caption for row in Dataset(options.workdir / "world").rows() for caption in row["captions"]}
    pairs = [pair for pair in fresh_clips(config.world, seen, 4 * options.count) if len(pair[1]) == 9]
    captions, clips = zip(*pairs[: options.count], strict=True)
    run = load_run(options.workdir / "transformer")
    make = Tasks(run, context=5)
    shown = {}

    def sampled(name: str, tasks: Sequence, prompts: Sequence[str] = captions) -> list[np.ndarray]:
        made = run.generate(prompts, tasks=tasks, seed=1)
        shown[name] = made[0]
        return made

    # The world's shapes cross the frame in the 9 frames of a clip: the halves of a clip are continued to a whole one.
    halves, ends = [clip[:5] for clip in clips], [clip[5:] for clip in clips]
    seams("real clips, frames 4 and 5", [seam(clip, 5) for clip in clips])
    rng, encode = np.random.default_rng(0), run.autoencoder.encode
    latents = [next(iter(encode([clip], 1))) for clip in clips]
    for level in (0.0, 0.1, 0.2):  # errors that each latent has for itself
        noisy = [z + level * rng.standard_normal(z.shape, np.float32) for z in latents]
        seams(f"latents + {level} noise, 4 and 5", [seam(clip, 5) for clip in run.decode(noisy)])
    plain = run.generate(captions, [clip.shape[:3] for clip in clips], seed=1)
    seams("text to video, frames 4 and 5", [seam(clip, 5) for clip in plain])
    identity("text to video", captions, plain, plain)
    images = sampled("image to video", [make.animate(clip[:1], 9) for clip in clips])
    identity("image to video", captions, images, clips)
    seams("image to video, after the image", [seam(clip, 1) for clip in images])
    longer = sampled("extend by 4", [make.extend(clip, 4) for clip in halves])
    seams("extend by 4", [seam(clip, 5) for clip in longer])
    identity("extend by 4", captions, longer, clips)
    before = sampled("5 frames before", [make.extend(clip, -5) for clip in ends])
    seams("5 frames before", [seam(clip, 5) for clip in before])
    identity("5 frames before", captions, before, clips)
    joined = sampled("connect", [make.connect(clip[:3], clip[7:], 4) for clip in clips])
    seams("connect, first join", [seam(clip, 3) for clip in joined])
    seams("connect, second join", [seam(clip, 7) for clip in joined])
    identity("connect", captions, joined, clips)
    loops = sampled("loop from text", [make.loop((8, *clip.shape[1:3])) for clip in clips])
    seams("loop from text, wrap", [closure(clip) for clip in loops])
    identity("loop from text", captions, loops, loops)
    closed = sampled("closed to a loop", [make.close(clip[:8], 8) for clip in clips], [turned(c) for c in captions])
    seams("closed to a loop, wrap", [closure(clip) for clip in closed])
    sampled("pad by 12 pixels", [make.fill(*pad(clip, 12, 0, 12, 0)) for clip in clips[:8]], captions[:8])
    sampled("edit by 0.8", [make.edit(clip, 0.8) for clip in clips[:8]], [captions[-1]] * 8)
    sampled("rewrite", [make.rewrite(clip, c) for clip, c in zip(clips[:8], captions)], [captions[-1]] * 8)
    with jax.set_mesh(run.mesh):
        shown["long"] = long_clip(run, captions[0], clips[0].shape[1:3], options.frames)
    rows = [strip(clip, min(len(clip), SHOWN), 2) for clip in shown.values()]
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 6), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    print("rows of tasks.png:", ", ".join(shown), "of the caption", captions[0])
    save_png(options.out / "tasks.png", np.concatenate(rows))


if __name__ == "__main__":
    main()
