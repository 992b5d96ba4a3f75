"""Measure a trained autoencoder on clips that it was not trained on, and show its reconstructions."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from sora_jax.config import check, read_json
from sora_jax.console import progress
from sora_jax.data.storing.manifest import Dataset, evenly_spread
from sora_jax.data.viewing.sheets import contact_sheet, gallery, strip
from sora_jax.data.viewing.write import save_png, write_video
from sora_jax.errors import UserError
from sora_jax.evaluate.autoencoder_report import NOISE, Report, Robustness
from sora_jax.evaluate.linear_bound import choose_clips, fit_bound, reconstruct
from sora_jax.evaluate.metrics import (
    LatentStatistics,
    Quality,
    average,
    average_by_size,
    latent_statistics,
    psnr,
    quality,
)
from sora_jax.evaluate.spectrum import compare_spectra
from sora_jax.files import as_path, write_json
from sora_jax.generate.preview import scale_of
from sora_jax.models import codes
from sora_jax.models.first_stage import FirstStageConfig, block_of, codes_of, encode
from sora_jax.models.pixels import PixelsConfig
from sora_jax.models.tiling import TilingConfig, tile_grid
from sora_jax.train.autoencoder import check_sizes, to_float, to_uint8
from sora_jax.train.exported import output_folder, run_folder
from sora_jax.train.frozen import FrozenAutoencoder, load_autoencoder
from sora_jax.train.reconstruction import resolution_of_loss

PROBED_CLIPS = 16  # at most, whose latents are disturbed
SHOWN_CLIPS = 8
SHEET_WIDTH = 1600  # pixels, about, of a picture or video with several clips side by side

Counted = Callable[[Iterable[Any]], Iterator[Any]]  # iterates, and moves the bar with each item


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Choose what an autoencoder is measured on, and where the files go."""

    clips: int = 64  # of the dataset that are measured, at most, evenly spread
    batch: int = 4  # clips, or tiles of them, encoded or decoded at once
    tiles: TilingConfig = TilingConfig()  # larger clips are encoded and decoded in tiles
    out: Path | None = None  # folder of report.json, comparison.png and comparison.mp4; None: RUN/evaluation
    seed: int = 0  # of the noise on latents and of the choice of training clips for the linear bound

    def __post_init__(self):
        for name in ("clips", "batch"):
            check(getattr(self, name) > 0, f"--{name} is {getattr(self, name)}; it must be positive")
        check(self.seed >= 0, f"--seed is {self.seed}; it must be 0 or more")


@dataclasses.dataclass(frozen=True)
class _Clips:
    """Read the measured clips of a dataset, ordered by size so that each size is compiled once."""

    dataset: Dataset
    rows: list[dict]
    split: str
    available: int

    def read(self, places: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """Yield the frames of all clips, or of those at the given places of `rows`."""
        rows = self.rows if places is None else [self.rows[place] for place in places]
        return (self.dataset[row["index"]].frames for row in rows)

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """Return (frames, height, width) of each clip."""
        return [_size(row) for row in self.rows]


def _size(row: dict) -> tuple[int, int, int]:
    return row["frames"], row["height"], row["width"]


def evaluate_autoencoder(run: str | Path, data: str | Path, options: EvaluateOptions = EvaluateOptions()) -> Report:
    """Measure the frozen autoencoder of a run folder on a dataset folder; write the files and return the report.

    Clips outside the split that the run was trained on are measured; training clips, where there are no others.

    Raises:
        UserError: there is no autoencoder or dataset, or the autoencoder cannot encode clips of a size.
    """
    autoencoder, dataset = load_autoencoder(run), Dataset(data)
    config, tiles = autoencoder.config, options.tiles
    if isinstance(config, PixelsConfig):
        raise UserError(
            f"--autoencoder is {str(run)!r}; it gives back every clip as it is: there is nothing to measure"
        )
    check_sizes(config, dataset)
    tile_grid(config, tiles)
    trained = _trained_split(run)
    clips = _choose(dataset, trained, options.clips)
    probed = evenly_spread(range(len(clips.rows)), PROBED_CLIPS)
    shown = evenly_spread(probed, SHOWN_CLIPS)
    fitted = choose_clips(dataset.rows(trained), options.seed)
    total = len(fitted) + 4 * len(clips.rows) + 5 * len(probed)
    with progress(total=total, desc="evaluate", unit="clip") as bar:
        counted = functools.partial(_counted, bar)
        bound, notes = _bound(config, clips, fitted, options.seed, counted)
        posterior = _posteriors(autoencoder, clips, tiles, counted)
        latents = list(counted(autoencoder.encode(clips.read(), options.batch, tiles=tiles)))
        qualities, kept = _qualities(autoencoder, clips, latents, options, set(shown), counted)
        before = [qualities[place].psnr for place in probed]
        some = [latents[place] for place in probed]
        robust = _robustness(autoencoder, list(clips.read(probed)), some, before, options, counted)
        bar.update(bar.total - bar.n)  # what was skipped
    if bound and average(qualities).psnr < average(bound).psnr:
        notes.append("the PSNR is below the linear bound: the autoencoder needs more training, or is broken")
    if clips.split == trained:
        notes.append("the dataset holds out no clip: the autoencoder is measured on clips that it was trained on")
    out = output_folder(run) / "evaluation" if options.out is None else as_path(options.out)
    report = Report(
        autoencoder=str(run),
        data=str(data),
        split=clips.split,
        clips=len(clips.rows),
        available=clips.available,
        block=block_of(config),
        channels=config.latent_channels,
        parameters={name: sum(x.size for x in jax.tree.leaves(part)) for name, part in autoencoder.params.items()},
        compression=_compression(config),
        rate=sum(z.size for z in latents) / sum(math.prod(size) for size in clips.sizes),
        quality=average(qualities),
        by_size=average_by_size(qualities, clips.sizes),
        bound=average(bound) if bound else None,
        bound_by_size=average_by_size(bound, clips.sizes) if bound else {},
        latents=posterior,
        loss_resolution=resolution_of_loss(config.l1_weight, config.l2_weight, config.kl_weight, _compression(config)),
        loss_resolution_l2=resolution_of_loss(0.0, config.l2_weight, config.kl_weight, _compression(config)),
        codes=_codes(autoencoder, latents),
        spectrum=compare_spectra(latents, clips.read()),
        robustness=robust,
        notes=notes,
        files=[str(path) for path in _write_comparison(out, clips, kept, qualities)] + [str(out / "report.json")],
    )
    write_json(out / "report.json", dataclasses.asdict(report))
    return report


def _trained_split(run: str | Path) -> str:
    """Return the split that a run was trained on, by its config; "train" for an autoencoder without one."""
    path = run_folder(run, "--autoencoder") / "config.json"
    return read_json(path).get("split", "train") if path.exists() else "train"


def _choose(dataset: Dataset, trained: str, most: int) -> _Clips:
    held_out = dataset.held_out(trained)
    rows = held_out or dataset.rows(trained)
    check(rows, f"the dataset {str(dataset.path)!r} has no clip")
    return _Clips(dataset, sorted(evenly_spread(rows, most), key=_size), "held-out" if held_out else trained, len(rows))


def _counted(bar: tqdm, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        bar.update()
        yield item


def _compression(config: FirstStageConfig) -> float:
    return 3 * math.prod(block_of(config)) / config.latent_channels


def _codes(autoencoder: FrozenAutoencoder, latents: list[np.ndarray]) -> dict[str, float] | None:
    """Count the codes of discrete latents."""
    config, channels = codes_of(autoencoder.config), autoencoder.config.latent_channels
    if config.name == "none":
        return None
    usage = codes.Usage(codes.codebook_size(config, channels))
    for z in latents:
        usage.add(codes.indices(config, z * autoencoder.std_C + autoencoder.mean_C))
    rate = usage.bits_per_pixel(block_of(autoencoder.config))
    found = {"use": usage.use, "perplexity": usage.perplexity, "bits_per_pixel": rate}
    return {"size": usage.size, "tokens": usage.tokens} | found


def _bound(
    config: FirstStageConfig, clips: _Clips, fitted: list[int], seed: int, counted: Counted
) -> tuple[list[Quality], list[str]]:
    """Measure the linear bound on the clips; without one, return no qualities but a note."""
    try:
        check(fitted, "the dataset has no training clip")
        codec = fit_bound(config, counted(clips.dataset[i].frames for i in fitted), seed)
    except UserError as error:
        return [], [f"no linear bound: {error}"]
    pairs = zip(clips.read(), reconstruct(codec, clips.read()), strict=True)
    return [quality(clip, decoded) for clip, decoded in counted(pairs)], []


@functools.partial(jax.jit, static_argnums=1)
def _posterior(params: dict, config: FirstStageConfig, video_BTHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    return encode(params, config, to_float(video_BTHWC))


def _posteriors(
    autoencoder: FrozenAutoencoder, clips: _Clips, tiles: TilingConfig, counted: Counted
) -> LatentStatistics:
    """Describe the posterior of the clips, or of their first tiles."""
    corner = tuple(slice(side or None) for side in tiles.tile)
    found = []
    for clip in counted(clips.read()):
        parts = _posterior(autoencoder.params, autoencoder.config, clip[corner][None])
        found.append([np.asarray(part).reshape(-1, part.shape[-1]) for part in parts])
    mean_nC, logvar_nC = (np.concatenate(part) for part in zip(*found, strict=True))
    return latent_statistics(mean_nC, logvar_nC)


def _qualities(
    autoencoder: FrozenAutoencoder,
    clips: _Clips,
    latents: list[np.ndarray],
    options: EvaluateOptions,
    kept: set[int],
    counted: Counted,
) -> tuple[list[Quality], dict[int, np.ndarray]]:
    """Measure the reconstruction of each clip; return also the reconstructions at the places in `kept`."""
    decoded = counted(autoencoder.decode(latents, options.batch, options.tiles))
    qualities, held = [], {}
    for place, (clip, other) in enumerate(zip(clips.read(), decoded, strict=True)):
        qualities.append(quality(clip, other))
        if place in kept:
            held[place] = other
    return qualities, held


def _robustness(
    autoencoder: FrozenAutoencoder,
    clips: list[np.ndarray],
    latents: list[np.ndarray],
    before: list[float],
    options: EvaluateOptions,
    counted: Counted,
) -> Robustness:
    """Decode disturbed latents; `before` is the PSNR of each clip without disturbance."""

    def decoded(some: Sequence[np.ndarray], tiles: TilingConfig = options.tiles) -> Iterator[np.ndarray]:
        return counted(autoencoder.decode(some, options.batch, tiles))

    rngs = (np.random.default_rng((options.seed, number)) for number in range(len(latents)))
    noisy = [z + NOISE * rng.standard_normal(z.shape, np.float32) for z, rng in zip(latents, rngs, strict=True)]
    even = [i for i, z in enumerate(latents) if z.shape[1] % 2 == z.shape[2] % 2 == 0]
    halves = (to_uint8(_half_size(clips[i] / 127.5 - 1.0)) for i in even)
    turned = [np.rot90(z, axes=(1, 2)) for z in latents]
    grid = tile_grid(autoencoder.config, options.tiles)
    corners = [z[tuple(slice(side or None) for side in grid)] for z in latents]
    corners = [z for z in corners if min(z.shape[1:3]) >= 4]  # two tiles, of two positions each
    cut = _in_halves(autoencoder, corners, options.tiles.overlap, counted)
    return Robustness(
        clips=len(clips),
        noise_change=float(np.mean(_psnrs(clips, decoded(noisy))) - np.mean(before)),
        half_size=_mean(_psnrs(halves, decoded([_half_size(latents[i]) for i in even]))),
        rotated=float(np.mean(_psnrs((np.rot90(clip, axes=(1, 2)) for clip in clips), decoded(turned)))),
        seams=_mean(_psnrs(decoded(corners, TilingConfig()), cut)),
    )


def _psnrs(wanted: Iterable[np.ndarray], found: Iterable[np.ndarray]) -> list[float]:
    return [psnr(*pair) for pair in zip(wanted, found, strict=True)]


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _half_size(x_THWC: np.ndarray) -> np.ndarray:
    """Halve height and width bilinearly, without aliases."""
    T, H, W, C = x_THWC.shape
    return np.asarray(jax.image.resize(x_THWC.astype(np.float32), (T, H // 2, W // 2, C), "bilinear", antialias=True))


def _in_halves(
    autoencoder: FrozenAutoencoder, latents: list[np.ndarray], overlap: float, counted: Counted
) -> Iterator[np.ndarray]:
    """Decode each latent in tiles of half its height and width."""
    space = autoencoder.config.space_factor
    for z in latents:
        sides = (-(-side // 2) * space for side in z.shape[1:3])
        yield from counted(autoencoder.decode([z], 1, TilingConfig((0, *sides), overlap)))


def _write_comparison(out: Path, clips: _Clips, decoded: dict[int, np.ndarray], qualities: list[Quality]) -> list[Path]:
    """Write comparison.png and, if a clip has several frames, comparison.mp4, of the given reconstructions."""
    strips, pairs, titles = [], [], []
    for place, clip in zip(decoded, clips.read(list(decoded)), strict=True):
        scale, own = scale_of(clip), "x".join(map(str, clip.shape[:3]))
        strips.append(np.concatenate([strip(x, 5, scale) for x in (clip, decoded[place])])[None])
        pairs.append(np.concatenate([clip, decoded[place]], axis=2).repeat(scale, axis=1).repeat(scale, axis=2))
        titles.append(f"{own}: clip above, reconstruction below, {qualities[place].psnr:.1f} dB")
    columns = [max(1, min(3, SHEET_WIDTH // max(x.shape[2] for x in group))) for group in (strips, pairs)]
    files = [save_png(out / "comparison.png", contact_sheet(strips, titles, columns[0], shown=1))]
    if any(len(pair) > 1 for pair in pairs):
        fps = clips.dataset.row(clips.rows[-1]["index"])["fps"]
        files.append(write_video(out / "comparison.mp4", gallery(pairs, columns[1], scale=1), fps))
    return files
