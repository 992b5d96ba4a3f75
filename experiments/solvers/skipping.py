"""Measure what skipping steps of a quickstart run costs and saves.

    python experiments/solvers/skipping.py --workdir=runs/quickstart

Calibrates by the prompts of the run's previews, then samples held-out captions of its world with and without skipping,
in turn. Prints for each error, and for fewer steps without skipping, which steps run, the time and processor time
against all steps, the PSNR against the clips of all steps, and what the oracle finds in the clips.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import jax
import numpy as np

from sora_jax.data.storing.manifest import Dataset
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.diffusion.spacing import count_steps
from sora_jax.evaluate.world import score
from sora_jax.generate.requests import Request
from sora_jax.generate.run import Run, load_run
from sora_jax.generate.sampler import sample_latents, trunk_ratios
from sora_jax.generate.skipping import choose_skipped


def requests_of(run: Run, prompts: list[str], sizes: list[tuple[int, int, int]]) -> list[Request]:
    """Return one request for each prompt, guided as the run is."""
    scale = run.config.sampling.guidance.scale
    pairs = enumerate(zip(prompts, sizes, strict=True), 1)
    return [Request(prompt, run.latent_size(*size), number, guidance=scale) for number, (prompt, size) in pairs]


def psnr(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Return the mean over clips of the PSNR of pixels, in dB; of 255 levels."""
    errors = [np.square(a.astype(float) - b).mean() for a, b in zip(found, wanted, strict=True)]
    return float(np.mean([10 * np.log10(255**2 / max(error, 1e-9)) for error in errors]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--errors", type=float, nargs="*", default=[0.06, 0.12, 0.24])
    parser.add_argument("--most", type=int, default=2)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    run = load_run(options.workdir / "transformer")
    rows = Dataset(options.workdir / "world").held_out()[: options.count]
    captions = [row["captions"][0] for row in rows]
    requests = requests_of(run, captions, [(row["frames"], row["height"], row["width"]) for row in rows])
    preview, plain = run.config.preview, run.config.sampling
    sizes = [preview.sizes[i % len(preview.sizes)] for i in range(len(preview.prompts))]
    ways: dict[str, SamplingConfig] = {"all": plain}
    with jax.set_mesh(run.mesh):
        ratios_XK = trunk_ratios(run, requests_of(run, list(preview.prompts), sizes), plain, run.config.seed)
        for error in options.errors:
            skipped = choose_skipped(ratios_XK, error, options.most)
            ways[f"error {error}"] = dataclasses.replace(plain, skipped=skipped)
            ran = count_steps(plain.steps, plain.spacing) - len(skipped)
            ways[f"{ran} steps, all run"] = dataclasses.replace(plain, steps=str(ran))
        latents = {name: sample_latents(run, requests, way, 1) for name, way in ways.items()}  # compiles
        wall: dict[str, list[float]] = {name: [] for name in ways}
        busy: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                begin, processor = time.perf_counter(), time.process_time()
                sample_latents(run, requests, way, 1)
                wall[name].append(time.perf_counter() - begin)
                busy[name].append(time.process_time() - processor)
        clips = {name: run.decode(found) for name, found in latents.items()}
    print(f"{len(captions)} held-out captions; ratios of the branches:\n{np.round(ratios_XK, 3)}")
    for name, way in ways.items():
        ratio = [np.median(np.array(times["all"]) / np.array(times[name])) for times in (wall, busy)]
        found, facts = score(captions, clips[name]), ("triple", "colour", "kind", "motion")
        rates = ", ".join(f"{fact} {getattr(found, fact):.1%}" for fact in facts)
        ran = count_steps(way.steps, way.spacing) - len(way.skipped)
        print(
            f"{name:18} {ran:2} run   {ratio[0]:.2f} times as fast (processor time {ratio[1]:.2f})   "
            f"PSNR {psnr(clips[name], clips['all']):5.1f} dB   {rates}   skipped {list(way.skipped)}"
        )


if __name__ == "__main__":
    main()
