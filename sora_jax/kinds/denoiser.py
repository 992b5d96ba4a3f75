"""Runs of the denoiser: trained on a latent cache, with the cache's autoencoder kept beside it."""

import dataclasses
import functools
from pathlib import Path

import jax
from jax.sharding import Mesh

from sora_jax.config import check
from sora_jax.data.feeding.tokenizer import Tokenizer
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.store import ClipStore
from sora_jax.errors import UserError
from sora_jax.files import as_path
from sora_jax.generate.doubts import Learnt
from sora_jax.generate.preview import denoiser_preview, own_preview, preview_requests
from sora_jax.generate.requests import latent_size
from sora_jax.generate.run import Run
from sora_jax.parallel import distributed
from sora_jax.parallel.mesh import check_split, make_mesh
from sora_jax.plan.denoiser import sample_latents, train_denoiser
from sora_jax.train.denoiser import (
    DenoiserRun,
    Text,
    check_text,
    denoiser_groups,
    denoiser_job,
    denoiser_parts,
    open_latents,
    prepare_tokenizer,
)
from sora_jax.train.encode import copy_autoencoder
from sora_jax.train.fastest_attention import keep_attention, with_fastest_attention
from sora_jax.train.frozen import FrozenAutoencoder, load_autoencoder, recorded_fingerprint, saved_steps
from sora_jax.train.held_out import HeldOut, HeldOutClips
from sora_jax.train.kind import Inputs, Kind
from sora_jax.train.loop import Job, Measure, log
from sora_jax.train.seen import Seen, look, read_seen, save_seen
from sora_jax.train.state import MODEL


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserInputs(Inputs):
    """Hold the inputs of a run.

    cache: the latents. share: this process's part of a batch. computed: the config with its attention chosen.

    seen: the sizes of the clips that are trained on, and the words of their captions; None where not all is known.
    """

    cache: LatentCache
    seen: Seen | None
    autoencoder: FrozenAutoencoder
    tokenizer: Text
    computed: DenoiserRun
    mesh: Mesh
    share: ShardSpec


def check_labels(store: ClipStore, classes: int, split: str) -> None:
    """Raise UserError unless every clip of a split has one of so many classes."""
    labels = store.labels[store.indices(split)]
    what = "latent cache" if isinstance(store, LatentCache) else "dataset"
    have = f"classes up to {labels.max()}" if labels.max() >= 0 else "no class"
    have = "clips without a class" if labels.min() < 0 <= labels.max() else have
    check(
        0 <= labels.min() and labels.max() < classes,
        f"config.model.classes is {classes}; the {what} {store.path} has {have}: every clip needs one "
        f"of 0 to {classes - 1}, from a column `label` or a TFDS class label",
    )


def open_inputs(config: DenoiserRun, workdir: Path, mesh: Mesh) -> DenoiserInputs:
    """Open the latent cache with its autoencoder and the tokenizer; check that model, cache and mesh fit together."""
    check(
        config.latents or config.drawn,
        "--config.latents is not given; it must be a folder made by `sora-jax data encode`",
    )
    try:
        cache = open_latents(config)
    except UserError as error:
        where = "" if as_path(config.latents).is_absolute() else f", as seen from {Path.cwd()}"
        raise UserError(f"--config.latents is {config.latents!r}{where}: {error}") from error
    check(
        cache.info.latent_channels == config.model.latent_channels,
        f"config.model.latent_channels is {config.model.latent_channels}; the latents in {config.first_stage!r} "
        f"have {cache.info.latent_channels}",
    )
    autoencoder = load_autoencoder(config.first_stage, "--config.latents")
    cache.check(autoencoder.fingerprint)
    if text := config.model.text:
        check_text(cache, text.pretrained, text.pretrained_width, config.tokenizer.max_tokens)
    if config.model.classes:
        check_labels(cache, config.model.classes, config.split)
    if own := recorded_fingerprint(workdir):
        cache.check(own)  # latents made anew are not those this run has learnt
    elif config.init.weights and recorded_fingerprint(config.init.source[0]) not in (None, autoencoder.fingerprint):
        log(f"--init-from is {config.init.weights!r}; it has learnt the latents of another autoencoder than these are")
    check_split(mesh, "batch", config.batch // config.loop.accumulate, "config.batch / config.loop.accumulate")
    check_split(mesh, "length", config.packing.length, "config.packing.length")
    check_split(mesh, "length", config.packing.text_length, "config.packing.text_length")
    for size in config.preview.sizes:
        latent_size(config, autoencoder.config, size)
    return DenoiserInputs(
        digest=cache.digest,
        text=cache.info.text.fingerprint if cache.info.text else None,
        clips=cache.splits,
        cache=cache,
        seen=_look(config, cache, workdir),
        autoencoder=autoencoder,
        tokenizer=prepare_tokenizer(config, cache, workdir),
        computed=with_fastest_attention(config, mesh, workdir),
        mesh=mesh,
        share=distributed.share_of_batch(mesh),
    )


def _look(config: DenoiserRun, cache: LatentCache, workdir: Path) -> Seen | None:
    """Return what the run has seen when it has trained; None if it began with weights of which that is not known."""
    seen = read_seen(workdir)
    if seen is None:
        seen = look(cache, config.split, config.model.patch)
        if config.init.weights:
            before = read_seen(config.init.source[0])
            seen = before and seen.plus(before)
    if seen is None:
        return None
    unknown = read_seen(workdir) is None and bool(saved_steps(workdir))  # how a run of an earlier version began
    return dataclasses.replace(seen, dropped=seen.dropped or unknown or config.diffusion.caption_dropout > 0)


def make_job(config: DenoiserRun, inputs: DenoiserInputs, workdir: Path) -> Job:
    """Make the job, with samples of the averaged parameters as previews."""
    looking = make_mesh(devices=jax.local_devices()) if distributed.several() else inputs.mesh
    computed, tasks = own_preview(inputs.computed, inputs.cache)
    make_run = functools.partial(
        Run,
        computed,
        tokenizer=inputs.tokenizer,
        autoencoder=inputs.autoencoder,
        mesh=looking,
    )
    preview = None
    if computed.preview.any:
        preview = denoiser_preview(lambda averages: make_run(params=averages[MODEL]), workdir, tasks)
    else:
        log("config.preview names no prompts or classes: no samples are shown while training")
    folder = as_path(workdir) / "captions"
    job = denoiser_job(inputs.computed, inputs.cache, inputs.tokenizer, preview, folder, inputs.share)
    note = "\n".join([job.note, *_doubts(config, inputs, bool(saved_steps(workdir)))])
    return dataclasses.replace(job, note=note, measure=_measure(inputs))


def _measure(inputs: DenoiserInputs) -> Measure | None:
    """Return the measurement of held-out clips; None if it is off, or if there is no such clip, which is said."""
    config = inputs.computed
    if not config.held_out.every:
        return None
    held_out = HeldOut(config, HeldOutClips(config, inputs.cache, inputs.tokenizer, inputs.share))
    if not held_out:
        log(f"the latent cache {inputs.cache.path} holds out no clip that fits: no held-out loss is measured")
        return None
    return Measure(config.held_out.every, lambda step, averages: held_out(averages))


def _doubts(config: DenoiserRun, inputs: DenoiserInputs, begun: bool) -> list[str]:
    """Return a line for each thing that previews ask for and the run will not learn; UserError for unread prompts."""
    config, tasks = own_preview(config, inputs.cache)
    learnt = Learnt(config, inputs.autoencoder.config, inputs.tokenizer, inputs.seen)
    lines, scale = [], config.sampling.guidance.scale
    if scale != 1.0 and learnt.never_dropped and (config.model.text or config.model.classes):
        lines.append(
            f"diffusion.caption_dropout is 0 and sampling.guidance.scale is {scale:g}: guidance will lead away from "
            "what is never learnt; set --config.diffusion.caption_dropout=0.1 or --config.sampling.guidance.scale=1"
        )
    if config.preview.any:
        requests = preview_requests(config, inputs.autoencoder.config, tasks)
        try:
            learnt.check_spelt(requests)
        except UserError as error:
            text = f"--config.preview.prompts: {error}"
            if not begun:  # a run that goes on is not refused for its previews
                raise UserError(text) from error
            lines.append(text)
        lines += [f"preview: {line}" for line in learnt.of_texts(requests) + learnt.of_sizes(requests)]
    return lines


def claim(config: DenoiserRun, inputs: DenoiserInputs, workdir: Path) -> None:
    """Keep the chosen attention, the autoencoder and the tokenizer, so that the run can be used alone."""
    if inputs.computed != config:
        keep_attention(inputs.computed, workdir)
    copy_autoencoder(config.first_stage, workdir)
    if inputs.seen:
        save_seen(inputs.seen, workdir)
    if isinstance(inputs.tokenizer, Tokenizer):
        inputs.tokenizer.save(as_path(workdir) / "tokenizer.json")


DENOISER = Kind(
    config=DenoiserRun,
    groups=denoiser_groups,
    parts=denoiser_parts,
    open=open_inputs,
    job=make_job,
    programs={"train": train_denoiser, "sample": sample_latents},
    may_change=(
        "latents",
        "captions",
        "packing",
        "preview",
        "held_out",
        "sampling",
        *(f"diffusion.{field}" for field in ("times", "weight", "caption_dropout", "given")),
        *(f"diffusion.{field}" for field in ("self_conditioning", "low_noise")),
        *(f"model.{field}" for field in ("attention", "sequence", "remat", "unroll", "dtype")),
    ),
    claim=claim,
)
