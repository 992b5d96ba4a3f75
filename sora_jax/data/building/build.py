"""Build a dataset folder from sources of clips (`data build`)."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import chain, product

from sora_jax.config import check, from_dict, to_dict
from sora_jax.console import log
from sora_jax.console import progress as bar
from sora_jax.data.building.pool import Refusal, map_with_timeout
from sora_jax.data.building.prepare import BuildConfig, Mix, Unit, hashed_split, open_sources, prepare, split_draw
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.clips import Clip
from sora_jax.data.storing.manifest import FORMAT, KIND, Dataset, add_clip
from sora_jax.data.storing.parts import PartWriter, ShardedWriter, start
from sora_jax.errors import UserError
from sora_jax.files import as_path

FEW = 5  # files, of which a build holds out one at least
MACHINERY = dict(out="", workers=0, seconds=60.0, shard="0/1")  # does not decide what is in the dataset


def build(config: BuildConfig, progress: bool = True, make: Callable[..., None] | None = None) -> Dataset | None:
    """Read every clip of the sources, give it an allowed size and length, and write the folder `config.out`.

    Clips that cannot be used are listed in `refused.jsonl` and never stop the build. The dataset does not depend on
    the number of workers and of processes. A build that was stopped resumes after its last whole part; a folder that
    was built before with the same options from the same files is returned as it is.

    make: makes some parts instead of `make_parts`, with its arguments. Returns None while other processes
    (`config.shard`) still work on their parts.

    Raises:
        UserError: a source is missing or empty or has nothing that can be used, or `out` is in use.
    """
    share, mix = ShardSpec.parse(config.shard), open_sources(config)
    if (made := _built_before(config, mix)) is not None:
        return made
    check(len(mix) or mix.refused, f"{_sources(config)}; it must hold videos or pictures, there are none")
    options = build_options(config, mix)
    parts = start(config.out, KIND, {"options": options}, max(1, -(-len(mix) // config.clips_per_shard)))
    missing = parts.missing(share)
    if progress and (done := parts.count - len(parts.missing())):
        log(f"{done} of {parts.count} parts are made, {len(missing)} are left for this process")
    (make or make_parts)(config, mix, parts, missing, progress)

    def nothing_usable(refused: list[dict]) -> str:
        counts = tally(entry["reason"] for entry in refused)
        examples = {reason_kind(entry["reason"]): f"{entry['file']}: {entry['reason']}" for entry in refused}
        return f"{_sources(config)}; it holds nothing usable: {counts}; {'; '.join(examples.values())}"

    header = {"format": FORMAT, "options": options, "train_config": config.train_config}
    finished = parts.finish(header, nothing_usable, partial(hold_out_one, config, mix))
    return Dataset(config.out) if finished else None


def make_parts(config: BuildConfig, mix: Mix, parts: ShardedWriter, numbers: list[int], progress: bool = False) -> None:
    """Decode and write these parts of the dataset, one after the other; files that listing refused go to part 0."""
    units = {part: units_of(config, mix, part) for part in numbers}
    flat = list(chain.from_iterable(units.values()))
    with closing(map_with_timeout(partial(prepare, mix, config), flat, config.workers, config.seconds)) as results:
        shown = iter(bar(results, "clips", len(flat), disable=not progress))
        for part in numbers:
            with parts.write(part) as writer:
                for file, reason in mix.refused if part == 0 else ():
                    writer.refuse(file, reason)
                for unit, result in zip(units[part], shown):
                    write_result(writer, config, mix, unit, result)
        next(shown, None)  # to the end, where the bar is full


def units_of(config: BuildConfig, mix: Mix, part: int) -> list[Unit]:
    """Return the units of a part, in order: the clips of a file, and of each the variants, follow each other."""
    entries = range(len(mix))[part * config.clips_per_shard :][: config.clips_per_shard]
    mirrored = (False, True) if config.mirror else (False,)
    versions = product(entries, range(config.clips_per_file), mirrored, range(config.variants))
    return [Unit(*version) for version in versions]


def write_result(writer: PartWriter, config: BuildConfig, mix: Mix, unit: Unit, result: Clip | Refusal | None) -> None:
    """Append the clip of a unit to its part, or list its file as refused."""
    source, place = mix.find(unit.entry)
    entry = source.entry(place)
    if isinstance(result, Clip):
        frames, height, width, _ = result.frames.shape
        tokens = config.size_rule.tokens(frames, height, width)
        split = entry.split or hashed_split(config, result.id)
        version = unit.variant + config.variants * unit.mirrored
        add_clip(writer, result, entry.file, split, tokens, version, entry.weight)
    elif result is not None:
        writer.refuse(entry.file, result.reason)


def hold_out_one(config: BuildConfig, mix: Mix, rows: Iterator[dict]) -> Callable[[dict], dict]:
    """Return what becomes of each row: where no clip of `FEW` files or more is held out by its hash, one file is.

    It is the one with the smallest hash, so it does not depend on the order and on who builds. Splits that are given
    stay as they are.
    """
    draws = {}
    for row in rows:
        if row["split"] != "train":
            return lambda row: row
        draws[row["id"].split(".")[0]] = split_draw(config, row["id"])
    places = map(mix.find, range(len(mix)))
    if not config.holdout or len(draws) < FEW or any(source.entry(place).split for source, place in places):
        return lambda row: row
    chosen = min(draws, key=draws.__getitem__)
    return lambda row: row | {"split": "held-out"} if row["id"].split(".")[0] == chosen else row


def build_options(config: BuildConfig, mix: Mix) -> dict:
    """Return all that decides what is in the dataset, as JSON: the options and a digest of each source."""
    options = to_dict(config) | MACHINERY | {"digests": [source.digest for source in mix.sources]}
    del options["train_config"]  # options are in the digest of a dataset, which was there before this field
    return options


def _built_before(config: BuildConfig, mix: Mix) -> Dataset | None:
    """Return the dataset that `out` holds; UserError if it was built with other options or from other files."""
    out = as_path(config.out)
    if not (out / "dataset.json").exists():
        return None
    options, before = build_options(config, mix), Dataset.read_header(out)["options"]
    digests = {"digests": before.pop("digests")}
    before = to_dict(from_dict(BuildConfig, before)) | digests  # fields that it did not have yet are by default
    changed = [name for name in options if options[name] != before[name]]  # the digests last
    if changed:
        name = changed[0]
        option = f"with --{name.replace('_', '-')}={before[name]}, not {options[name]}"
        how = "from other files" if name == "digests" else option
        raise UserError(f"--out is {config.out!r}; it was built {how}: give another folder or remove it")
    return Dataset(config.out)


def reason_kind(reason: str) -> str:
    """Return the kind of a reason or flag, which stands before its first colon."""
    return reason.split(":")[0]


def tally(reasons: Iterable[str]) -> str:
    """Count reasons by kind, most frequent first: "2 x unreadable, 1 x no caption"."""
    return ", ".join(f"{n} x {name}" for name, n in Counter(map(reason_kind, reasons)).most_common())


def _sources(config: BuildConfig) -> str:
    option = "--path" if all(source.path for source in config.sources) else "--source"
    return f"{option} is {', '.join(repr(source.path or source.name) for source in config.sources)}"
