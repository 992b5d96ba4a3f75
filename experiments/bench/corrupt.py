"""Decode every file of some folders, and variants of the small ones that are damaged in many ways.

python experiments/bench/corrupt.py FOLDER... [--broken=FOLDER] [--variants=2000] [--seconds=10] [--most-silent=0.06]

FOLDERs hold sound files, none of which may be refused or used in part; --broken holds files that may be. A variant has
flipped bytes, a zeroed block or no end (seeded) and is compared with the intact clip. Exit code 1 for a crash, a hang,
a sound file that is refused, or a larger share of variants that give other pictures without a flag.
"""

import argparse
import io
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timing

from sora_jax.data.building.pool import Refusal, map_with_timeout
from sora_jax.data.fit import SizeRule
from sora_jax.data.reading.media import DecodedClip, SpanRule, decode
from sora_jax.data.reading.tracks import MediaError

SMALL = 450_000  # bytes
FIT = SizeRule(2, 128 * 128)
RULE = SpanRule(max_frames=512)
NEAR = 30.0  # dB
DAMAGES = ("flips", "zeros", "end cut off")
NO_MEDIA = (".csv", ".jsonl", ".md", ".tar", ".txt", ".zip")
WHOLE = ("whole", "refused: no allowed size", "refused: too large")  # what may become of a sound file


@dataclass(frozen=True)
class Variant:
    """A file and the damage that is done to it."""

    path: str
    damage: str = ""
    seed: int = 0


def damaged(data: bytes, damage: str, seed: int) -> bytes:
    """Return the bytes of a file after one to eight flipped bytes, a zeroed block, or without the end."""
    random = np.random.default_rng(seed)
    raw = np.frombuffer(data, np.uint8).copy()
    if damage == "flips":
        places = random.integers(0, len(raw), random.integers(1, 9))
        raw[places] ^= random.integers(1, 256, len(places), dtype=np.uint8)
    elif damage == "zeros":
        start = random.integers(0, len(raw))
        raw[start : start + random.integers(16, 2048)] = 0
    else:
        raw = raw[: random.integers(1, len(raw))]
    return raw.tobytes()


def read(variant: Variant) -> DecodedClip | str:
    """Return the clip, or the reason of its refusal."""
    data = Path(variant.path).read_bytes()
    try:
        return decode(io.BytesIO(damaged(data, variant.damage, variant.seed) if variant.damage else data), RULE, FIT)
    except MediaError as error:
        return str(error)


def outcome(result: DecodedClip | str | Refusal, intact: DecodedClip | None) -> str:
    """Return what became of a file in a few words."""
    if isinstance(result, Refusal):
        return result.reason.split(":")[0]
    if isinstance(result, str):
        return f"refused: {result.split(':')[0]}"
    same = intact is None or likeness(result, intact) >= NEAR
    if set(result.flags) - set(intact.flags if intact else [f for f in result.flags if not f.startswith("partial")]):
        return "used in part, with a flag" + ("" if same else ", other pictures")
    if not same:
        return "SILENT: other pictures"
    if intact is None:
        return "whole"
    return "whole, as the intact one" if len(result.frames) == len(intact.frames) else "shorter, pictures as intact"


def likeness(clip: DecodedClip, intact: DecodedClip) -> float:
    """Return the lowest PSNR of a frame in dB; minus infinity where size or rate differ or there are more frames."""
    count = len(clip.frames)
    if clip.frames.shape[1:] != intact.frames.shape[1:] or count > len(intact.frames):
        return -np.inf
    if count > 1 and abs(clip.fps / intact.fps - 1) > 0.01:
        return -np.inf
    errors = ((clip.frames.astype(np.float32) - intact.frames[:count]) ** 2).mean((1, 2, 3))
    return float(10 * np.log10(255**2 / max(errors.max(), 1e-9)))


def make_variants(paths: list[str], count: int) -> list[Variant]:
    """Return so many variants, spread evenly over files and damages."""
    kinds = len(DAMAGES)
    return [Variant(paths[n // kinds % len(paths)], DAMAGES[n % kinds], n) for n in range(count)]


def judge(variants: list[Variant], intact: dict[str, DecodedClip], workers: int, seconds: float) -> list[str]:
    """Return the outcome of each variant."""
    results = map_with_timeout(read, variants, workers, seconds)
    return [outcome(result, intact.get(v.path)) for v, result in zip(variants, results, strict=True)]


def table(variants: list[Variant], outcomes: list[str], column: Callable[[Variant], str]) -> list[list[str]]:
    """Return the counts by outcome and by `column(variant)`; the first row is the header."""
    counts = Counter((text, column(variant)) for variant, text in zip(variants, outcomes, strict=True))
    names = sorted({column(variant) for variant in variants})
    rows = [["outcome", *names, "all"]]
    for text in sorted({text for text, _ in counts}):
        numbers = [counts[text, name] for name in names]
        rows.append([text, *(str(number) for number in numbers), str(sum(numbers))])
    return rows


def find(folders: list[str]) -> list[Variant]:
    """Return the files below some folders as they are, without those that hold no pictures."""
    paths = [path for folder in folders for path in sorted(Path(folder).rglob("*"))]
    return [Variant(str(path)) for path in paths if path.is_file() and path.suffix not in NO_MEDIA]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--broken", nargs="*", default=[])
    parser.add_argument("--variants", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--most-silent", type=float, default=0.06)
    options = parser.parse_args(arguments)
    machine = timing.machine()
    sound, broken = find(options.folders), find(options.broken)
    clips = list(map_with_timeout(read, sound + broken, options.workers, options.seconds))
    outcomes = [outcome(clip, None) for clip in clips]
    header, *rows = table(sound + broken, outcomes, lambda variant: "sound" if variant in sound else "broken")
    lost = [f"{Path(v.path).name}: {text}" for v, text in zip(sound, outcomes) if text not in WHOLE]
    print(timing.report(header, rows, f"Sound files that are not whole: {'; '.join(lost) or 'none'}.", machine))
    pairs = [(v.path, clip) for v, clip, text in zip(sound, clips, outcomes) if text == "whole"]
    intact = {path: clip for path, clip in pairs if Path(path).stat().st_size < SMALL}
    variants = make_variants(list(intact), options.variants)
    found = judge(variants, intact, options.workers, options.seconds)
    header, *rows = table(variants, found, lambda variant: variant.damage)
    silent = [v for v, text in zip(variants, found) if text.startswith("SILENT")]
    names = "; ".join(f"{name}: {count}" for name, count in Counter(Path(v.path).name for v in silent).most_common())
    notes = f"Variants of {len(intact)} clips below {SMALL} bytes. Silent ones: {names or 'none'}."
    print("\n" + timing.report(header, rows, notes, machine))
    stopped = [text for text in outcomes + found if text in ("crash", "hang")]
    return int(bool(lost or stopped) or len(silent) > options.most_silent * len(variants))


if __name__ == "__main__":
    sys.exit(main())
