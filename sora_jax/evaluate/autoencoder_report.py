"""What is measured of an autoencoder, and its lines of text."""

import dataclasses
from collections.abc import Sequence

from sora_jax.evaluate.metrics import LatentStatistics, Quality, table
from sora_jax.evaluate.spectrum import Spectrum, bands

NOISE = 0.1  # standard deviation of the noise on normalised latents
EXACT = 90.0  # dB, above which only the rounding of single pixels differs


@dataclasses.dataclass(frozen=True)
class Robustness:
    """Report what the decoder makes of disturbed latents, in dB; None where no clip has a size for it."""

    clips: int
    noise_change: float  # of the PSNR, when noise of deviation NOISE is added to normalised latents
    half_size: float | None  # PSNR of decoded half-size latents against half-size clips, both resized bilinearly
    rotated: float  # PSNR of decoded latents rotated by 90 degrees against rotated clips
    seams: float | None  # PSNR of clips decoded in tiles of half their sides against clips decoded whole


@dataclasses.dataclass(frozen=True)
class Report:
    """Hold all measurements; `dataclasses.asdict` makes JSON of them and `text` a table for people."""

    autoencoder: str
    data: str
    split: str  # "held-out", or the name of the training split where nothing is held out
    clips: int
    available: int  # clips of that split
    block: tuple[int, int, int]  # frames, rows and columns of pixels to a latent position
    channels: int
    parameters: dict[str, int]  # of each part
    compression: float  # pixel values to a latent value, beyond the first frame
    rate: float  # latent values per pixel of these clips
    quality: Quality
    by_size: dict[str, Quality]  # by FRAMESxHEIGHTxWIDTH
    bound: Quality | None  # of the linear bound: `evaluate.linear_bound`
    bound_by_size: dict[str, Quality]
    latents: LatentStatistics
    loss_resolution: float | None  # dB: `train.reconstruction.resolution_of_loss`
    loss_resolution_l2: float | None  # dB, of the L2 term without the L1 term
    codes: dict[str, float] | None  # of discrete latents: their number, and how many of them are used
    spectrum: Spectrum | None
    robustness: Robustness
    notes: list[str]
    files: list[str]

    @property
    def text(self) -> str:
        """Return the measurements as lines of text."""
        return "\n".join([*_heading(self), "", *_table(self), "", *_details(self)])


def _heading(report: Report) -> list[str]:
    parts = ", ".join(f"{name} {count:,}" for name, count in report.parameters.items())
    return [
        f"autoencoder  {report.autoencoder}",
        f"             {'x'.join(map(str, report.block))} pixels to a latent of {report.channels} channels",
        f"             {report.compression:.3g} pixel values per latent value, {report.rate:.3g} latent values a pixel",
        f"parameters   {parts}",
        f"clips        {report.clips} of {report.available} {report.split} clips of {report.data}",
    ]


def _table(report: Report) -> list[str]:
    """Return the rows of quality: all clips, each size if there are several, and the linear bound."""
    rows = {name: (own, report.bound_by_size.get(name)) for name, own in report.by_size.items()}
    if len(rows) > 1:
        rows = {"all": (report.quality, report.bound)} | rows
    if report.bound:
        rows["linear bound"] = report.bound, None
    return table(rows)


def _details(report: Report) -> list[str]:
    own, robust = report.latents, report.robustness
    lines = [
        f"latents      KL {own.kl:.3g} nats per value, by channel {_range(own.kl_by_channel)}; "
        f"dead channels {len(own.dead)} of {report.channels}",
        f"             std {_range(own.std)}, posterior std {_range(own.posterior_std)}, "
        f"kurtosis {_range(own.kurtosis)} (normal: 3)",
        f"loss         L1, L2 and KL allow a PSNR up to about {_decibels(report.loss_resolution)}, "
        f"L2 and KL alone {_decibels(report.loss_resolution_l2)}",
    ]
    if used := report.codes:
        lines = [
            f"codes        {used['size']:,}, of which {used['tokens']:,} tokens use {used['use']:.1%}; perplexity "
            f"{used['perplexity']:,.0f}; {used['bits_per_pixel']:.3g} bits per pixel"
        ]
    if found := report.spectrum:
        lines += [
            f"spectrum     share of the energy at high frequencies: latents {found.high_share_latents:.3f}, "
            f"images {found.high_share_images:.3f} (white noise: .5)",
            f"   latents   {_bands(found.latents)}  DCT of {found.block}x{found.block} blocks,",
            f"   images    {_bands(found.images)}  low to high",
        ]
    seams = "exact" if robust.seams is not None and robust.seams > EXACT else _decibels(robust.seams)
    seams += " (clips are smaller than two tiles)" * (robust.seams is None)
    lines += [
        f"decoder      noise of {NOISE} on latents changes PSNR by {robust.noise_change:+.2f} dB",
        f"             half-size latents {_decibels(robust.half_size)}, rotated latents {_decibels(robust.rotated)}",
        f"             tiles of half the side against whole clips: {seams}",
        *(f"note         {note}" for note in report.notes),
        f"files        {', '.join(report.files)}",
    ]
    return lines


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):.3g} to {max(known):.3g}" if known else "-"


def _bands(shares: list[float]) -> str:
    return " ".join(f"{share:.3f}" for share in bands(shares))


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} dB"
