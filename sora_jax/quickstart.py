"""Run `sora-jax quickstart`: the whole system on the embedded world, from nothing to generated clips.

Stages: render the world, train the autoencoder, cache latents, train the transformer, sample, evaluate. Each is
the same code as its own command, leaves its result in a folder of its own, and is skipped when that is complete.
"""

import dataclasses
import json
import re
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sora_jax import console
from sora_jax.config import check, from_dict, load
from sora_jax.config_files import package_config
from sora_jax.data.building.build import build
from sora_jax.data.building.prepare import BuildConfig
from sora_jax.data.packing.packs import grid_of
from sora_jax.data.sources import SourceConfig
from sora_jax.data.storing.manifest import Dataset
from sora_jax.data.viewing.sheets import contact_sheet, gallery
from sora_jax.data.viewing.write import save_png, write_video
from sora_jax.errors import UserError
from sora_jax.evaluate.curves import draw_losses
from sora_jax.evaluate.world import Score, cleanness, held_out_prompts, in_words, score, triple
from sora_jax.files import read_text, write_json
from sora_jax.generate.preview import scale_of
from sora_jax.generate.run import Run, load_run
from sora_jax.kinds.run import check_data, check_workdir, train
from sora_jax.models.first_stage import latent_grid
from sora_jax.parallel.settings import prepare_jax
from sora_jax.train.autoencoder import AutoencoderRun, stage_folder
from sora_jax.train.denoiser import DenoiserRun, PreviewConfig
from sora_jax.train.encode import encode_dataset
from sora_jax.train.frozen import FOLDER
from sora_jax.worlds import WorldConfig
from sora_jax.worlds.oracle import agreement

Size = tuple[int, int, int]
READ = 48  # characters of what the oracle reads that a table shows
NO_NAME = re.compile(r'[\s/\\:*?"<>|\x00-\x1f]')  # what no name of a file may hold


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """Configure the quickstart; paths inside `autoencoder` and `transformer` are filled in from the work folder."""

    world: WorldConfig = WorldConfig()  # what is drawn
    clips: int = 4000  # number of clips that are rendered
    holdout: float = 0.1  # share of them that is not trained on
    workers: int = 2  # processes that render
    autoencoder: AutoencoderRun = AutoencoderRun()
    transformer: DenoiserRun = DenoiserRun()
    show: PreviewConfig = PreviewConfig()  # prompts, sizes and settings of the final samples
    evaluate: int = 64  # held-out prompts that the oracle scores
    closing: str = ""  # a line that is printed at the end

    def __post_init__(self):
        check(0 < self.holdout < 1, f"holdout is {self.holdout}; it must be between 0 and 1")
        check(
            0 < round(self.clips * self.holdout) < self.clips,
            f"clips is {self.clips}; with holdout = {self.holdout} no clip is held out, or none is left to train on",
        )
        check(self.evaluate > 0, f"evaluate is {self.evaluate}; it must be positive")
        check(len(self.show.prompts) == len(self.show.sizes), "show.prompts and show.sizes must be of equal length")


def main(config_file: str | None, changes: list[str], workdir: Path) -> None:
    """Run all stages in `workdir`, going on where an earlier call stopped."""
    start, resumed = time.perf_counter(), (workdir / "world").exists()
    prepare_jax()
    config = from_dict(QuickstartConfig, load(config_file or default_config(), changes), "--config")
    check_sizes(config)
    dataset = render_world(config, workdir)
    autoencoder_psnr = learn_autoencoder(config, dataset, workdir)
    console.log("3/5  latents: every clip through the autoencoder, once")
    encode_dataset(workdir / "autoencoder", workdir / "world", workdir / "latents")
    learn_transformer(config, workdir)
    console.log("5/5  samples")
    run = load_run(workdir / "transformer")
    show_samples(config, run, workdir / "samples")
    result = evaluate(config, run, dataset, workdir)
    autoencoders = [stage_folder(workdir / "autoencoder", i) for i in range(len(config.autoencoder.stages))]
    runs = [*(autoencoders or [workdir / "autoencoder"]), workdir / "transformer"]
    draw_losses({str(run.relative_to(workdir)): run for run in runs}, workdir / "losses.png")
    seconds = time.perf_counter() - start
    report = dataclasses.asdict(result) | {"autoencoder_psnr": autoencoder_psnr, "seconds": seconds}
    write_json(workdir / "report.json", report)
    minutes = f"{seconds / 60:.1f} minutes" + " in this start alone" * resumed
    console.result(report, f"{in_a_line(result)}\n{minutes}; everything is in {workdir}")
    if config.closing:
        console.log(config.closing)


def check_sizes(config: QuickstartConfig) -> None:
    """Raise a UserError, before minutes are spent, where the parts of the config do not fit together."""
    encoder = config.autoencoder.model
    denoiser = config.transformer.model
    world = config.world
    check(
        encoder.latent_channels == denoiser.latent_channels,
        f"config.transformer.model.latent_channels is {denoiser.latent_channels}; "
        f"it must equal config.autoencoder.model.latent_channels = {encoder.latent_channels}",
    )
    drawn = [(frames, *size) for frames in (1, *world.frames) for size in world.sizes]
    for size in (*drawn, *config.show.sizes, *config.transformer.preview.sizes):
        try:
            grid_of(latent_grid(encoder, *size), denoiser.patch)
        except UserError as error:
            shown = " x ".join(map(str, size))
            raise UserError(f"the config has clips of {shown} (frames x height x width): {error}") from error


def default_config() -> str:
    """Return the path of configs/quickstart.py, as it came with the package."""
    return str(package_config("quickstart.py"))


def render_world(config: QuickstartConfig, workdir: Path) -> Dataset:
    """Run stage 1; its sheet of clips and captions is there within the first minute."""
    console.log("1/5  the embedded world")
    frames = max(config.world.frames)
    held_out = round(config.clips * config.holdout)
    source = SourceConfig("world", world=config.world, limit=config.clips, world_held_out=held_out)
    options = BuildConfig(
        out=str(workdir / "world"), sources=(source,), max_frames=frames, workers=config.workers, max_pixels=None,
        time_factor=config.autoencoder.model.time_factor, multiple=config.autoencoder.model.space_factor,
    )  # fmt: skip
    dataset = build(options)
    assert dataset is not None  # one process builds all of it
    check(
        bool(held_out_prompts(dataset, 1)),
        "no held-out clip moves and has a caption that no training clip has, so nothing can be scored: "
        "give more clips, a larger holdout, or 'move' among world.motions",
    )
    sheet = workdir / "world.png"
    clips = [dataset[i] for i in range(12)]
    save_png(sheet, contact_sheet([c.frames for c in clips], [c.caption for c in clips], columns=3, scale=3))
    console.log(f"     look at {sheet}")
    return dataset


def learn_autoencoder(config: QuickstartConfig, dataset: Dataset, workdir: Path) -> float:
    """Run stage 2; return the PSNR in dB on held-out clips."""
    console.log("2/5  autoencoder")
    result = workdir / "autoencoder" / FOLDER / "autoencoder.json"
    options = dataclasses.replace(config.autoencoder, data=str(workdir / "world"))
    check_workdir(workdir / "autoencoder", options)
    check_data(workdir / "autoencoder", dataset.digest)
    steps = options.stages[-1].steps if options.stages else options.loop.steps
    if not result.exists() or json.loads(read_text(result))["steps"] < steps:
        train(options, workdir / "autoencoder")
    found = json.loads(read_text(result))["held_out_psnr"]
    console.log(f"     PSNR on held-out clips {found:.1f} dB")
    return found


def learn_transformer(config: QuickstartConfig, workdir: Path) -> None:
    """Run stage 4, with a strip of samples that grows."""
    console.log(f"4/5  transformer; see it learn in {workdir / 'transformer' / 'samples' / 'progress.png'}")
    options = dataclasses.replace(config.transformer, latents=str(workdir / "latents"))
    train(options, workdir / "transformer")


def show_samples(config: QuickstartConfig, run: Run, out: Path) -> None:
    """Sample all prompts of `show` in one packed call: files, a sheet, a gallery, and what the oracle reads in them."""
    show = config.show
    clips = run.generate(show.prompts, list(show.sizes), show.steps or None)
    for i, (prompt, clip) in enumerate(zip(show.prompts, clips, strict=True)):
        name = f"{i:02d}_{NO_NAME.sub('_', prompt)[:60]}"
        for ending in ("png",) if len(clip) == 1 else ("mp4", "gif"):
            write_video(out / f"{name}.{ending}", clip, show.fps, upscale=scale_of(clip))
    save_png(out / "contact_sheet.png", contact_sheet(clips, list(show.prompts), columns=2, scale=3, shown=5))
    write_video(out / "gallery.gif", gallery(clips), show.fps)
    console.log(table(show.prompts, clips))


def table(prompts: Sequence[str], clips: list[np.ndarray]) -> str:
    """Return a table: prompt, size, what the oracle reads in the clip, whether they agree, and how clean it is."""
    rows = [("prompt", "size", "the oracle reads", "agreement", "one shape", "edge error")]
    for prompt, clip in zip(prompts, clips, strict=True):
        size = "x".join(map(str, clip.shape[:3]))
        found = agreement(prompt, clip)
        verdict = "-" if found.kind is None else "yes" if triple(found) else "no"  # "-": it names no shape
        clean = cleanness(clip)
        constant = "-" if len(clip) == 1 else "yes" if clean.constant else "no"
        read = textwrap.shorten(in_words(clip), READ, placeholder=" ...")
        rows.append((prompt, size, read, verdict, constant, f"{clean.edge_error:.3f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def evaluate(config: QuickstartConfig, run: Run, dataset: Dataset, workdir: Path) -> Score:
    """Measure the agreement of held-out prompts with their clips, with the rate of each fact."""
    chosen = held_out_prompts(dataset, config.evaluate)
    prompts, sizes = [p for p, _ in chosen], [s for _, s in chosen]
    show = config.show
    clips = run.generate(prompts, sizes, show.steps or None, seed=1)
    save_png(workdir / "held_out.png", contact_sheet(clips[:24], prompts[:24], columns=4, scale=2))
    return score(prompts, clips)


def in_a_line(found: Score) -> str:
    """Return the scores as text."""
    return (
        f"{found.clips} held-out prompts: colour, kind and motion all right {found.triple:.0%}"
        f" (colour {found.colour:.0%}, kind {found.kind:.0%}, motion {found.motion:.0%}, count {found.count:.0%});"
        f" identity constancy {found.constancy:.2f}, physics error {found.physics_error:.3f};"
        f" shape constancy {found.shape_constancy:.0%}, edge error {found.edge_error:.3f}, speckle {found.speckle:.3f}"
    )
