"""What damaged files do to `decode`: every file of some folders, and small clips of them damaged in many ways.

python experiments/bench/corrupt.py FOLDER... [--variants=2000] [--seconds=10]

Each variant of a small clip (bytes flipped, a block zeroed, the end cut off; seeded) is decoded in a worker process
and compared with what the intact clip gives. Exit code 1 where a clip was wrong and nobody was told, or one hung.
"""

import argparse
import io
import sys
from collections import Counter
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
RULE = SpanRule(max_frames=256)
NEAR = 30.0  # dB
DAMAGES = ("flips", "zeros", "end cut off")


@dataclass(frozen=True)
class Variant:
    """A file and what is done to it."""

    path: str
    damage: str = ""
    seed: int = 0


def damaged(data: bytes, damage: str, seed: int) -> bytes:
    """The bytes of a file after one to eight flipped bytes, a zeroed block, or without the end."""
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
    """The clip, or why there is none."""
    data = Path(variant.path).read_bytes()
    try:
        return decode(io.BytesIO(damaged(data, variant.damage, variant.seed) if variant.damage else data), RULE, FIT)
    except MediaError as error:
        return str(error)


def outcome(result: DecodedClip | str | Refusal, intact: DecodedClip | None) -> str:
    """What became of a file, in a word or two."""
    if isinstance(result, Refusal | str):
        reason = result if isinstance(result, str) else result.reason
        return ("" if isinstance(result, Refusal) else "refused: ") + reason.split(":")[0]
    same = intact is None or likeness(result, intact) >= NEAR
    if result.flags:
        return "used in part, with a flag" + ("" if same else ", other pictures")
    if not same:
        return "SILENT: other pictures"
    if intact is None:
        return "whole"
    return "whole, as the intact one" if len(result.frames) == len(intact.frames) else "shorter, pictures as intact"


def likeness(clip: DecodedClip, intact: DecodedClip) -> float:
    """The lowest PSNR of a frame in dB; minus infinity where size or rate differ or there are more frames."""
    count = len(clip.frames)
    if clip.frames.shape[1:] != intact.frames.shape[1:] or count > len(intact.frames):
        return -np.inf
    if count > 1 and abs(clip.fps / intact.fps - 1) > 0.01:
        return -np.inf
    errors = ((clip.frames.astype(np.float32) - intact.frames[:count]) ** 2).mean((1, 2, 3))
    return float(10 * np.log10(255**2 / max(errors.max(), 1e-9)))


def make_variants(paths: list[str], count: int) -> list[Variant]:
    """So many variants, spread evenly over files and damages."""
    kinds = len(DAMAGES)
    return [Variant(paths[n // kinds % len(paths)], DAMAGES[n % kinds], n) for n in range(count)]


def judge(variants: list[Variant], intact: dict[str, DecodedClip], workers: int, seconds: float) -> list[str]:
    results = map_with_timeout(read, variants, workers, seconds)
    return [outcome(result, intact.get(v.path)) for v, result in zip(variants, results, strict=True)]


def rows(variants: list[Variant], outcomes: list[str], column) -> list[list[str]]:
    """Counts by outcome and by `column(variant)`, as a table's rows."""
    counts = Counter((text, column(variant)) for variant, text in zip(variants, outcomes, strict=True))
    names = sorted({column(variant) for variant in variants})
    table = [["outcome", *names, "all"]]
    for text in sorted({text for text, _ in counts}):
        numbers = [counts[text, name] for name in names]
        table.append([text, *(str(number) for number in numbers), str(sum(numbers))])
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--variants", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    machine = timing.machine()
    found = [str(p) for f in options.folders for p in sorted(Path(f).rglob("*")) if p.is_file() and p.suffix != ".csv"]
    files = [Variant(path) for path in found]
    as_they_are = list(map_with_timeout(read, files, options.workers, 6 * options.seconds))
    told = [outcome(result, None) for result in as_they_are]
    small = [v.path for v, text in zip(files, told) if text == "whole" and Path(v.path).stat().st_size < SMALL]
    intact = {v.path: result for v, result in zip(files, as_they_are) if v.path in set(small)}
    variants = make_variants(small, options.variants)
    outcomes = judge(variants, intact, options.workers, options.seconds)
    silent = [v for v, text in zip(variants, outcomes) if text.startswith("SILENT")]
    print(timing.report(*_split(rows(files, told, lambda v: Path(v.path).parent.name)), "Files as they are.", machine))
    print()
    ended = Counter(text for text in outcomes + told if text in ("crash", "hang"))
    notes = f"{_notes(silent, small)} Crashes: {ended['crash']}; hangs: {ended['hang']}."
    print(timing.report(*_split(rows(variants, outcomes, lambda v: v.damage)), notes, machine))
    return int(bool(silent) or ended["hang"] > 0)


def _split(table: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return table[0], table[1:]


def _notes(silent: list[Variant], small: list[str]) -> str:
    files = Counter(f"{Path(v.path).name}, {v.damage}" for v in silent)
    told = "; ".join(f"{name}: {number}" for name, number in files.most_common()) or "none"
    return f"Variants of {len(small)} clips below {SMALL} bytes. Silent ones: {told}."


if __name__ == "__main__":
    sys.exit(main())
