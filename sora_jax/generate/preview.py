"""Show what a run has learnt while it trains."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from sora_jax.config import check
from sora_jax.data.building.inspect import choose_shown
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.manifest import caption_of, evenly_spread
from sora_jax.data.viewing.sheets import contact_sheet, strip
from sora_jax.data.viewing.write import save_png, write_video
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.errors import NotFinite
from sora_jax.files import local_copy
from sora_jax.generate.doubts import print_lines
from sora_jax.generate.requests import Request, Task, Wanted, plan_requests
from sora_jax.generate.run import Run, changed
from sora_jax.models.denoiser import reads_low
from sora_jax.models.first_stage import FirstStageConfig
from sora_jax.models.tiling import TilingConfig
from sora_jax.train.autoencoder import AutoencoderRun
from sora_jax.train.denoiser import DenoiserRun
from sora_jax.train.frozen import FrozenAutoencoder
from sora_jax.train.loop import Preview
from sora_jax.train.metrics import MetricsWriter
from sora_jax.train.state import MODEL

SOME_CLIPS = 1000  # of which those that previews show are chosen
TILE = 40  # pixels that the shorter side of a tile is enlarged to at least, by a whole factor


class Reconstructions:
    """Reconstruct held-out clips with the averages of a step, once for the preview and for the PSNR.

    `whole` completes the parameters that are trained.
    """

    def __init__(
        self,
        config: AutoencoderRun,
        clips: Sequence[np.ndarray],
        whole: Callable[[dict], dict] = lambda trained: trained,
    ):
        self._config, self.clips, self._whole = config, clips, whole
        self._last: tuple[int, list[np.ndarray]] | None = None

    def __call__(self, step: int, averages: dict) -> list[np.ndarray]:
        """Return the reconstructions; NotFinite where they are not finite."""
        if self._last is None or self._last[0] != step:
            params, zero, one = self._whole(averages[MODEL]), np.zeros(1, np.float32), np.ones(1, np.float32)
            autoencoder = FrozenAutoencoder(self._config.model, jax.tree.map(np.asarray, params), zero, one)
            latents = autoencoder.encode(self.clips, 1, tiles=self._config.tiles)
            self._last = step, list(autoencoder.decode(latents, 1, self._config.tiles))
        return self._last[1]

    def psnr(self, step: int, averages: dict) -> dict[str, float]:
        """Return their mean PSNR in dB as a metric, NaN where they are not finite."""
        try:
            decoded = self(step, averages)
        except NotFinite:
            return {"held_out/psnr": float("nan")}
        return {"held_out/psnr": mean_psnr(self.clips, decoded)}


def reconstruction_preview(reconstruct: Reconstructions, captions: Sequence[str], workdir: Path) -> Preview:
    """Make a preview that writes samples/step_N.png: each held-out clip, and below it its reconstruction."""

    def preview(step: int, averages: dict, writer: MetricsWriter) -> None:
        clips, decoded = reconstruct.clips, reconstruct(step, averages)
        pairs = [np.concatenate([strip(a, 5, scale_of(a)), strip(b, 5, scale_of(b))]) for a, b in zip(clips, decoded)]
        qualities = (f"{mean_psnr([a], [b]):.1f} dB" for a, b in zip(clips, decoded))
        titles = [f"{quality}: {caption}" for quality, caption in zip(qualities, captions)]
        titles[0] = f"above the clip, below its reconstruction, {titles[0]}"
        image = contact_sheet([pair[None] for pair in pairs], titles, None, shown=1)
        save_png(workdir / "samples" / f"step_{step:06d}.png", image)
        writer.picture(step, "reconstructions", image)

    return _without_not_finite(preview)


def own_preview(config: DenoiserRun, cache: LatentCache) -> tuple[DenoiserRun, list[Task]]:
    """Give a preview of clips of the data (`preview.clips`) their captions as prompts, and their sizes.

    Returns tasks, too, for a network that reads clips at half their size: to enlarge those.
    """
    preview = config.preview
    if not preview.clips:
        return config, []
    splits = cache.column("split").to_numpy(zero_copy_only=False)
    held_out = np.flatnonzero(splits != config.split)
    clips = held_out if len(held_out) else cache.indices(config.split)
    some = np.array(evenly_spread(clips.tolist(), SOME_CLIPS))
    columns = {name: cache.column(name).take(some).to_pylist() for name in ("frames", "height", "width", "captions")}
    columns["index"] = some.tolist()
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    rows = [row | {"file": caption_of(row)} for row in rows if caption_of(row)]
    once = list({caption_of(row): row for row in rows}.values())
    shown = choose_shown(once if len(once) >= preview.clips else rows, preview.clips, preview.clips // 4)
    prompts = tuple(caption_of(row) for row in shown)
    sizes = tuple((row["frames"], row["height"], row["width"]) for row in shown) or preview.sizes
    lows = [cache.low(row["index"]) for row in shown] if reads_low(config.model) else []
    tasks = [Task(size, None, low=low) for size, low in zip(sizes, lows)]
    preview = dataclasses.replace(preview, clips=0, prompts=prompts, sizes=sizes)
    return dataclasses.replace(config, preview=preview), tasks


def preview_sampling(config: DenoiserRun) -> SamplingConfig:
    """Return how previews are sampled."""
    return changed(config.sampling, config.preview.steps or None, None)


def preview_requests(config: DenoiserRun, first_stage: FirstStageConfig, tasks: Sequence[Task] = ()) -> list[Request]:
    """Return the requests of a run's previews; tasks: what `own_preview` returned."""
    preview, own = config.preview, tasks or not reads_low(config.model)
    clips = "with model.low_resolution it must be preview.clips=N, to enlarge N clips"
    check(own, f"preview names prompts or classes; {clips}")
    sizes = [preview.sizes[i % len(preview.sizes)] for i in range(len(preview.prompts or preview.classes))]
    wanted = Wanted(preview.prompts, sizes, preview.classes, tasks=tasks)
    return plan_requests(config, first_stage, wanted, preview_sampling(config))


def denoiser_preview(run: Callable[[dict], Run], workdir: Path, tasks: Sequence[Task] = ()) -> Preview:
    """Make a preview that samples the config's prompts: clips of the step, a sheet, and a strip with all steps so far.

    `run` makes a usable Run of the averages. tasks: what `own_preview` returned.
    """

    def preview(step: int, averages: dict, writer: MetricsWriter) -> None:
        current = run(averages)
        config, sampling = current.config.preview, preview_sampling(current.config)
        requests = preview_requests(current.config, current.autoencoder.config, tasks)
        clips = current.sample(requests, sampling, current.config.seed)
        folder = workdir / "samples" / f"step_{step:06d}"
        for i, clip in enumerate(clips):
            ending = "png" if len(clip) == 1 else "mp4"
            write_video(folder / f"{i:02d}.{ending}", clip, config.fps, upscale=scale_of(clip))
        save_png(folder / "frames.png", _row(clips))
        image = progress_picture(workdir / "samples")
        save_png(workdir / "samples" / "progress.png", image)
        writer.picture(step, "samples", image)

    return _without_not_finite(preview)


def _without_not_finite(preview: Preview) -> Preview:
    """Report on stderr a preview that is not finite, in place of drawing it; the loop judges the training itself."""

    def finite(step: int, averages: dict, writer: MetricsWriter) -> None:
        try:
            preview(step, averages, writer)
        except NotFinite as error:
            print_lines([f"the preview of step {step} is left out: {error}"])

    return finite


def scale_of(clip: np.ndarray) -> int:
    """Return the whole factor by which a small clip is enlarged to be watched."""
    return max(1, -(-TILE * 2 // min(clip.shape[1:3])))


def _row(clips: Sequence[np.ndarray]) -> np.ndarray:
    """Place first, middle and last frame of each clip side by side on white."""
    tiles = [strip(clip, 3, max(1, -(-TILE // min(clip.shape[1:3])))) for clip in clips]
    height = max(tile.shape[0] for tile in tiles)
    pad = functools.partial(np.pad, constant_values=255)
    return np.concatenate([pad(t, ((2, 2 + height - t.shape[0]), (2, 6), (0, 0))) for t in tiles], axis=1)


def progress_picture(samples: Path) -> np.ndarray:
    """Draw all previews so far, a row each, oldest first."""
    from PIL import Image

    files = sorted(samples.glob("step_*/frames.png"))
    rows = [np.asarray(Image.open(local_copy(file)).convert("RGB"))[None] for file in files]
    steps = [f"step {int(file.parent.name.removeprefix('step_')):,}" for file in files]
    return contact_sheet(rows, steps, columns=1, shown=1)


def held_out_psnr(
    autoencoder: FrozenAutoencoder, clips: Sequence[np.ndarray], tiles: TilingConfig = TilingConfig()
) -> float:
    """Return the mean PSNR in dB of the reconstructions of uint8 clips, as they would be written to files."""
    latents = autoencoder.encode(clips, tiles=tiles)
    return mean_psnr(clips, autoencoder.decode(latents, tiles=tiles))


def mean_psnr(clips: Sequence[np.ndarray], decoded: Iterable[np.ndarray]) -> float:
    """Return the mean PSNR in dB of uint8 clips and their reconstructions."""
    pairs = zip(clips, decoded, strict=True)
    errors = [np.square(clip.astype(np.float64) - other.astype(np.float64)).mean() for clip, other in pairs]
    return float(np.mean([10 * np.log10(255.0**2 / max(error, 1e-4)) for error in errors]))
