"""`data build`: from sources of clips to a dataset folder."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial

from tqdm import tqdm

from sora_jax.data.building.guard import Failure, guarded_map
from sora_jax.data.building.prepare import BuildConfig, Mix, Refusal, Unit, hashed_split, open_sources, prepare, unit_at
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.clips import Clip
from sora_jax.data.storing.manifest import FORMAT, KEY, KIND, Dataset, add_clip, read_info
from sora_jax.data.storing.parts import PartWriter, ShardedWriter, start
from sora_jax.errors import UserError
from sora_jax.files import as_path

MACHINERY = dict(out="", workers=0, seconds=60.0, shard="0/1")  # does not decide what is in the dataset


def build(config: BuildConfig, progress: bool = True) -> Dataset | None:
    """Read every clip of the sources, give it an allowed size and length, write the folder `config.out`.

    Clips that cannot be used are counted and listed in `refused.jsonl` and never stop the build; what is in the
    dataset, and in what order, does not depend on the number of workers and of processes. A build that was stopped
    goes on after its last whole part; a folder built before with the same options from the same files is returned as
    it is. None where other processes (`config.shard`) still work on their parts.

    Raises UserError for an empty or missing source, one of which nothing can be used, an `out` in use.
    """
    mix = open_sources(config)
    if (made := built_before(config, mix)) is not None:
        return made
    check_not_empty(config, mix)
    share = ShardSpec.parse(config.shard)
    parts = start(config.out, KIND, {"options": build_options(config, mix)}, count_parts(config, mix))
    missing = parts.missing(share)
    if progress and (there := parts.count - len(parts.missing())):
        print(f"{there} of {parts.count} parts are there, {len(missing)} are made here", flush=True)
    make_parts(config, mix, parts, missing, progress)
    return finish(parts, config, mix)


def check_not_empty(config: BuildConfig, mix: Mix) -> None:
    """UserError where the sources name no file at all."""
    if not len(mix) and not mix.refused:
        raise UserError(f"path={_paths(config)} is empty: a folder with videos or pictures is allowed.")


def make_parts(config: BuildConfig, mix: Mix, parts: ShardedWriter, numbers: list[int], progress: bool) -> None:
    """Decode and write these parts of the dataset, one after the other."""
    units = [unit for part in numbers for unit in units_of(config, mix, part)]
    results = guarded_map(partial(prepare, mix, config), units, config.workers, config.seconds)
    results = iter(tqdm(results, "clips", len(units), disable=not progress))
    for part in numbers:
        with parts.write(part) as writer:
            write_part(writer, config, mix, part, results)
    next(results, None)  # to the end, where the bar is full and the processes go


def build_options(config: BuildConfig, mix: Mix) -> dict:
    """All that decides what is in the dataset, as JSON: the options and a digest of each source."""
    options = json.loads(json.dumps(asdict(replace(config, **MACHINERY)) | {"digests": mix.digests}))
    for source in options["sources"]:
        if source["world"] and not source["world"]["extra_captions"]:  # datasets from before the field was there go on
            del source["world"]["extra_captions"]
    return options


def _paths(config: BuildConfig) -> str:
    return ", ".join(source.path or source.name for source in config.sources)


def count_parts(config: BuildConfig, mix: Mix) -> int:
    """Into how many parts the work is divided."""
    return max(1, -(-len(mix) // config.clips_per_shard))


def units_of(config: BuildConfig, mix: Mix, part: int) -> list[Unit]:
    """The units of a part, in order."""
    first = part * config.clips_per_shard
    each = config.clips_per_file * config.versions
    last = min(first + config.clips_per_shard, len(mix))
    return [unit_at(config, index) for index in range(first * each, last * each)]


def write_part(
    writer: PartWriter, config: BuildConfig, mix: Mix, part: int, results: Iterator[Clip | Refusal | Failure | None]
) -> None:
    """Take the next results, those of the units of a part, into it; refused files of the listing go to part 0."""
    for file, reason in mix.refused if part == 0 else ():
        writer.refuse(file, reason)
    rule = config.size_rule
    for unit in units_of(config, mix, part):
        result = next(results)
        entry = mix.entry(unit.entry)
        if isinstance(result, Clip):
            frames, height, width, _ = result.frames.shape
            tokens = rule.tokens(frames, height, width)
            split = entry.split or hashed_split(config, result.id)
            version = unit.variant + config.variants * unit.mirrored
            add_clip(writer, result, entry.file, split, tokens, version, entry.weight)
        elif result is not None:
            writer.refuse(entry.file, result.reason)


def finish(parts: ShardedWriter, config: BuildConfig, mix: Mix) -> Dataset | None:
    """The dataset, if all its parts are there."""
    info = {"format": FORMAT, "options": build_options(config, mix)}
    if not parts.finish(info, KEY, partial(_nothing_usable, config)):
        return None
    return Dataset(config.out)


def _nothing_usable(config: BuildConfig, refused: list[dict]) -> str:
    last = refused[-1]
    counts = Counter(kind(entry["reason"]) for entry in refused)
    tally = ", ".join(f"{n} x {reason}" for reason, n in counts.most_common(3))
    return f"path={_paths(config)} holds nothing usable: {tally}; {last['file']}: {last['reason']}"


def built_before(config: BuildConfig, mix: Mix) -> Dataset | None:
    """The dataset that is there already; UserError where it was built with other options or from other files."""
    out = as_path(config.out)
    if not (out / "dataset.json").exists():
        return None
    options, before = build_options(config, mix), read_info(out)["options"]
    changed = sorted(name for name in options | before if options.get(name) != before.get(name))
    if changed == ["digests"]:
        raise UserError(f"out={config.out} was built from other files: give another folder or remove it.")
    if changed:
        name = next(name for name in changed if name != "digests")
        raise UserError(
            f"out={config.out} was built with {name}={before.get(name)!r}, not {options.get(name)!r}:"
            " give another folder or remove this one."
        )
    return Dataset(config.out)


def kind(reason: str) -> str:
    """A reason without its particulars."""
    return reason.split(":")[0]
