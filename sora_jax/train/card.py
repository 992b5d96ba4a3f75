"""Write the model card of a run, README.md: what it is, what it has learnt from, how well, and how it is used."""

import contextlib
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sora_jax.config import read_json
from sora_jax.files import as_path, read_text, write_text
from sora_jax.parallel import distributed
from sora_jax.train.frozen import FOLDER, RECORD
from sora_jax.train.metrics import read_metrics
from sora_jax.train.provenance import read_run
from sora_jax.train.seen import Seen, read_seen

CARD = "README.md"
MARKER = "<!-- Written by sora_jax, again after each training: remove this line to keep what you change. -->"
LICENCE = (
    "The licence of the data applies to the weights, too; sora_jax does not know it. "
    "Clips of worlds that sora_jax drew itself have none but its own."
)
METRICS_HEAD = ("| metric | value | step |", "|---|---|---|")
METRICS = {  # of the last report that has them, with their decimal places
    "loss": 4,
    "held_out/loss": 4,
    "held_out/psnr": 2,
    "held_out/accuracy": 3,
    "gradient_norm": 4,
    "padding_share": 4,
    "clips_per_second": 1,
}


def write_card(folder: Path) -> None:
    """Write the card into a run folder, by the first process; a card that fails must not end a run."""
    with contextlib.suppress(Exception):
        path = as_path(folder) / CARD
        own = path.exists() and MARKER not in read_text(path).splitlines()  # a README of the user
        if distributed.first() and not own and path.with_name("config.json").exists():
            write_text(path, card(folder))


def card(folder: str | Path, name: str = "", exported: Mapping[str, Any] | None = None) -> str:
    """Return the model card of a run folder, or of a model that is exported, in Markdown, from the files that it has.

    name: the folder in the commands of the card; by default `folder` as it is given. exported: what stands in
    `export.json`, of an exported model; its card does not say how to train on, and is not written again.
    """
    path, name = as_path(folder), name or str(folder)
    config, seen = read_json(path / "config.json"), read_seen(path)
    last = _last_stage(path)
    about, kind = exported or read_run(last), config.get("kind")
    title = {"autoencoder": "A video autoencoder", "classifier": "An image classifier"}.get(
        str(kind), "A text-to-video denoiser"
    )
    lines = [f"# {as_path(name).name}", "", f"{title}, trained with sora_jax.", "", "| | |", "|---|---|"]
    training = _exported(exported) if exported else _training(last, config, about)
    facts = {**_model(config, about), **_data(path, config, seen), **training}
    lines += [f"| {fact} | {value} |" for fact, value in facts.items() if value]
    metrics = _metrics(last)
    lines += ["", "## Metrics", "", *METRICS_HEAD, *metrics] if metrics else []
    if kind != "classifier":  # which no command uses but `train`
        own = _autoencoder_commands(name) if kind == "autoencoder" else _denoiser_commands(name, config, seen)
        lines += ["", "## Use", "", "```", *[*own][: 1 if exported else None], "```"]
    lines += [""]
    if not exported:
        lines += [LICENCE, "", MARKER, ""]
    return "\n".join(lines)


def _last_stage(path: Path) -> Path:
    """Return the folder of the newest stage, of a run that has stages; else the folder itself."""
    if (path / "metrics.jsonl").exists() or not path.exists():
        return path
    return max((entry for entry in path.iterdir() if entry.name.startswith("stage_")), default=path)


def _model(config: Mapping, about: Mapping) -> dict[str, str]:
    model = config.get("model") or {}
    counts = about.get("parameters", {})
    fixed = f", and {counts['fixed']:,} fixed ones" if counts.get("fixed") else ""
    sizes = {field: model[field] for field in ("depth", "width", "heads", "patch", "latent_channels") if field in model}
    network = ", ".join([model.get("name", ""), *(f"{field} {value}" for field, value in sizes.items())])
    parameters = f"{counts['trained']:,} trained{fixed}" if counts else ""
    return {"network": network.strip(", "), "parameters": parameters}


def _data(path: Path, config: Mapping, seen: Seen | None) -> dict[str, str]:
    record = path / "data.json"
    clips = (read_json(record).get("clips") or {}) if record.exists() else {}
    counts = ", ".join(f"{count:,} {split}" for split, count in clips.items())
    found = {"data": config.get("latents") or config.get("data", ""), "clips": counts}
    if seen is None:
        return found
    found["clips"] = counts or f"{seen.of:,} {config.get('split', 'train')}"
    pairs = {"frames": seen.frames, "height": seen.height, "width": seen.width}
    found["sizes"] = ", ".join(f"{side} {least} to {most}" for side, (least, most) in pairs.items())
    return found | {"words of captions": f"{len(seen.words):,}" if seen.words else ""}


def _training(folder: Path, config: Mapping, about: Mapping) -> dict[str, str]:
    starts, rows = about.get("starts", []), read_metrics(folder)
    step = max([start["to"] for start in starts] + [row["step"] for row in rows], default=0)
    own = read_json(folder / "config.json") if (folder / "config.json").exists() else config
    found = {"trained": f"{step:,} of {own['loop']['steps']:,} steps, batch {own['batch']}"}
    if not starts:
        return found
    last, first = starts[-1], starts[0]
    found["date"] = f"{first['start']} to {last['end']}, {len(starts)} start{'s' * (len(starts) > 1)}"
    found["devices"] = last["devices"]
    dirty = " with changes" if last.get("dirty") else ""
    found["code"] = f"sora_jax {last['sora_jax']}" + (
        f", commit {last['commit'][:12]}{dirty}" if "commit" in last else ""
    )
    names = ("python", "jax", "jaxlib", "flax", "numpy")
    found["versions"] = ", ".join(f"{name} {last[name]}" for name in names if name in last)
    return found | {"command": f"`{last['command']}`" if last.get("command") else ""}


def _exported(record: Mapping) -> dict[str, str]:
    weights = f"step {record['step']:,}, kept as {record['dtype']}"
    return {"weights": weights, "exported": f"by sora_jax {record['version']} on {record['date']}"}


def _metrics(folder: Path) -> list[str]:
    rows, lines = read_metrics(folder), []
    for name, places in METRICS.items():
        row = next((row for row in reversed(rows) if row.get(name) is not None), None)
        lines += [f"| {name} | {row[name]:.{places}f} | {row['step']:,} |"] if row else []
    record = folder / FOLDER / RECORD
    psnr = read_json(record).get("held_out_psnr") if record.exists() else None
    return [*lines, f"| PSNR of the autoencoder on held-out clips | {psnr:.2f} dB | |"] if psnr else lines


def _denoiser_commands(name: str, config: Mapping, seen: Seen | None) -> Iterator[str]:
    preview = config.get("preview") or {}
    prompts, classes, sizes = (preview.get(field) or () for field in ("prompts", "classes", "sizes"))
    what = f'--prompt="{prompts[0]}"' if prompts else f"--class={classes[0]}" if classes else '--prompt="..."'
    if seen and seen.example and not (prompts or classes):
        caption, *clip = seen.example
        what, sizes = f"--prompt={shlex.quote(caption)}", sizes or [clip]
    size: Any = sizes[0] if sizes else seen and (seen.frames[1], seen.height[0], seen.width[0])
    shape = "--frames={} --height={} --width={}".format(*size) if size else ""
    out = "clip.png" if size and size[0] == 1 else "clip.mp4"
    if (config.get("model") or {}).get("low_resolution"):  # makes clips of others
        yield f"sora-jax sample --workdir={name} {what} --video=FILE --upsample --out={out}"
        yield f"sora-jax evaluate {name} --metrics=loss"
    else:
        yield f"sora-jax sample --workdir={name} {what} {shape} --out={out}"
        yield f"sora-jax evaluate {name} --data=DATASET"
    yield f"sora-jax export {name} --out=FOLDER"
    yield f"sora-jax train --workdir={name}"


def _autoencoder_commands(name: str) -> Iterator[str]:
    yield f"sora-jax data encode --autoencoder={name} --data=DATASET --out=LATENTS"
    yield f"sora-jax evaluate --autoencoder={name} --data=DATASET"
    yield f"sora-jax train --workdir={name}"
