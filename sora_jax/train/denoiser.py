"""Training the denoiser: packed latents with captions in, a velocity (or noise, or clean patches) out."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sora_jax.config import check, read_json
from sora_jax.data import tokenizer as tokenizers
from sora_jax.data.captions import captions_in_order, parse_mix
from sora_jax.data.epochs import Position
from sora_jax.data.feed import FeedConfig
from sora_jax.data.latents import LatentCache
from sora_jax.data.packing import PackingConfig
from sora_jax.data.pipeline import packed_batches
from sora_jax.data.tokenizer import NoText, Tokenizer, TokenizerConfig
from sora_jax.diffusion.guidance import GuidanceConfig
from sora_jax.diffusion.keys import Purpose, clip_keys, step_key, token_noise
from sora_jax.diffusion.loss import denoising_loss, loss_weight
from sora_jax.diffusion.prediction import Denoise, check_pair
from sora_jax.diffusion.process import input_scale, process_named
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.diffusion.times import TimesConfig, batch_ranks, draw_times, per_token
from sora_jax.diffusion.weights import WeightConfig, check_weight
from sora_jax.files import as_path, write_json
from sora_jax.models.flops import train_flops
from sora_jax.models.pretrained import PretrainedText
from sora_jax.models.text import TextContext
from sora_jax.models.transformer import TransformerConfig, denoise, transformer_specs
from sora_jax.nn.attention.measured import Load, candidates, fastest
from sora_jax.nn.layers import compute_dtype
from sora_jax.nn.pack import Pack, drop_captions, per_slot, slot_of
from sora_jax.parallel import distributed
from sora_jax.parallel.mesh import MeshConfig
from sora_jax.parallel.rules import parts
from sora_jax.train.loop import Job, LoopConfig, log
from sora_jax.train.optim import OptimConfig

NOISE_BINS = 10
CHOICES = "attention.json"  # {kind of device: backend}


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The noise process, what is predicted, how times are drawn and how much the error counts at each.

    caption_dropout: the share of clips that are trained on without their caption and class, for guidance.
    """

    process: str = "linear_flow"
    prediction: str = "velocity"
    times: TimesConfig = TimesConfig()
    weight: WeightConfig = WeightConfig()
    caption_dropout: float = 0.1

    def __post_init__(self):
        check_pair(self.process, self.prediction)
        check_weight(self.weight.name, self.prediction)
        check(
            0 <= self.caption_dropout < 1,
            f"diffusion.caption_dropout is {self.caption_dropout}; it must be in [0, 1)",
        )


@dataclasses.dataclass(frozen=True)
class PreviewConfig:
    """Sample clips written while training: prompts or classes and sizes (frames, height, width) are paired in turn.

    steps: of the solver, "" for as many as `sampling` has.
    """

    prompts: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int, int], ...] = ()
    steps: str = ""
    fps: float = 8.0

    def __post_init__(self):
        check(not (self.prompts and self.classes), "preview.prompts and preview.classes are both given; give one")
        check(bool(self.sizes) or not self.any, "preview.sizes is empty; previews need at least one size")
        check(self.fps > 0, f"preview.fps is {self.fps}; it must be positive")

    @property
    def any(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.prompts or self.classes)


@dataclasses.dataclass(frozen=True)
class DenoiserRun:
    """A whole training run of the denoiser. `latents` is a folder made by `sora-jax data encode`.

    `batch` counts packs in a step over all devices, gradient accumulation included. `captions` says which of several
    captions a clip has in an epoch: first, any, dalle3, sd3, or shares such as original=1,synthetic=3. `sampling` is
    how the model is sampled unless it is asked otherwise.
    """

    kind: str = "transformer"
    latents: str = ""
    seed: int = 0
    batch: int = 8
    split: str = "train"
    captions: str = "first"
    model: TransformerConfig = TransformerConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    packing: PackingConfig = PackingConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    optim: OptimConfig = OptimConfig()
    loop: LoopConfig = LoopConfig()
    feed: FeedConfig = FeedConfig()
    mesh: MeshConfig = MeshConfig()
    preview: PreviewConfig = PreviewConfig()
    sampling: SamplingConfig = SamplingConfig(guidance=GuidanceConfig(3.0))

    def __post_init__(self):
        check(self.kind == "transformer", f"kind is {self.kind!r}; a DenoiserRun is of kind 'transformer'")
        check(0 <= self.seed < 2**32, f"seed is {self.seed}; it must be from 0 to 4294967295")
        parse_mix(self.captions)
        check(
            self.batch > 0 and self.batch % self.loop.accumulate == 0,
            f"batch is {self.batch}; it must be a multiple of loop.accumulate = {self.loop.accumulate}",
        )
        self._check_preview()
        check(
            self.packing.patch in (None, self.model.patch),
            f"packing.patch is {self.packing.patch}; leave it out, or give model.patch = {self.model.patch}",
        )

    def _check_preview(self) -> None:
        """What the first preview would otherwise tell, hours into the training."""
        preview, known = self.preview, self.model.classes
        check(
            bool(self.model.text) or not preview.prompts, "preview.prompts are given; a model without text has classes"
        )
        for label in preview.classes:
            check(
                0 <= label < known,
                f"preview.classes names {label}; with model.classes = {known} each must be below that",
            )
        if preview.steps:
            dataclasses.replace(self.sampling, steps=preview.steps)

    @property
    def packs(self) -> PackingConfig:
        """`packing` with the model's patch; a model without text has one null token for each clip."""
        text_length = self.packing.text_length if self.model.text else self.packing.slots
        return dataclasses.replace(self.packing, patch=self.model.patch, text_length=text_length)


def with_fastest_attention(config: DenoiserRun, mesh: Mesh, workdir: Path) -> DenoiserRun:
    """The config with "auto" attention settled where only a measurement can tell: to compute with, not to keep.

    What `keep_attention` wrote for this kind of device is taken again, so that a run that goes on, and what is sampled
    from it, is computed by the same program.
    """
    model = config.model
    if model.attention != "auto" or not candidates():
        return config
    kept = kept_attention(workdir).get(device_kind())
    if not distributed.all_true(kept is not None):
        packs = max(config.batch // config.loop.accumulate // parts("batch", mesh), 1)
        heads, dtype = model.heads // parts("heads", mesh), jnp.dtype(compute_dtype(model.dtype)).name
        kept, found = fastest(Load(packs, config.packing.length, heads, model.head_width, dtype))
        log(f"attention: {kept} ({found})")
    return dataclasses.replace(config, model=dataclasses.replace(model, attention=kept))


def keep_attention(config: DenoiserRun, workdir: Path) -> None:
    """Writes what computes attention on this kind of device to WORKDIR/attention.json."""
    if config.model.attention != "auto":
        write_json(as_path(workdir) / CHOICES, kept_attention(workdir) | {device_kind(): config.model.attention})


def kept_attention(workdir: Path) -> dict[str, str]:
    path = as_path(workdir) / CHOICES
    return read_json(path) if path.exists() else {}


def device_kind() -> str:
    return jax.local_devices()[0].device_kind


def migrate_config(values: dict) -> dict:
    """A plain config as earlier versions wrote it, as this one reads it: previews once had a guidance of their own."""
    preview = dict(values.get("preview", {}))
    if "guidance" not in preview and not isinstance(preview.get("steps"), int):
        return values
    scale = preview.pop("guidance", SamplingConfig().guidance.scale)
    preview["steps"] = str(preview.get("steps", ""))
    return values | {"preview": preview, "sampling": {"guidance": {"scale": scale}}}


def denoiser_loss(config: DenoiserRun, params: dict, pack: Pack, step: jax.Array):
    """Sum of the denoising loss over the real tokens of a batch, (weight, means): see `make_step`.

    Times, noise and what is dropped of captions and classes are functions of (seed, step, clip) alone.
    """
    diffusion = config.diffusion
    key = functools.partial(step_key, config.seed, step)
    tokens_BS = pack.grids_BS3.prod(-1)
    process = process_named(diffusion.process)
    times_BS = draw_times(diffusion.times, key(Purpose.TIME), pack.clip_ids_BS, tokens_BS, pack.ranks_BS, process)
    times_BR = per_slot(times_BS, pack.row_slots_BR)
    clip_ids_BL = per_slot(pack.clip_ids_BS, slot_of(pack.segments_BL))
    eps_BLP = token_noise(key(Purpose.NOISE), clip_ids_BL, pack.index_BL, pack.tokens_BLP.shape[-1])
    captions = drop_captions(pack, _drop(diffusion.caption_dropout, key(Purpose.CAPTION_DROPOUT), pack.clip_ids_BS))
    sums = denoising_loss(
        network(params, config, captions),
        process,
        diffusion.prediction,
        pack.tokens_BLP.astype(jnp.float32),
        eps_BLP,
        times_BR,
        pack.rows_BL,
        loss_weight(pack.segments_BL, times_BR, pack.rows_BL),
        NOISE_BINS,
        diffusion.weight,
        config.model.learned_variance,
    )
    means = {"loss_by_noise": (sums.loss_bins, sums.weight_bins)}
    if config.model.learned_variance:
        means |= {"mse": (sums.mse, sums.weight), "vlb_bits": (sums.vlb, sums.weight)}
    return sums.loss, (sums.weight, means)


def network(params: dict, config: DenoiserRun, pack: Pack, text: TextContext | None = None) -> Denoise:
    """The model with everything but noisy tokens and noise levels bound, its input scaled as the process asks."""
    process = process_named(config.diffusion.process)

    def predict(x_BLP, t_BR):
        scale_BL1 = input_scale(process, per_token(t_BR, pack.rows_BL))[:, :, None]
        return denoise(params, config.model, pack, scale_BL1 * x_BLP, t_BR, text)

    return predict


def _drop(share: float, key: jax.Array, clip_ids_BS: jax.Array) -> jax.Array:
    draw_BS = jax.vmap(jax.vmap(lambda clip_key: jax.random.uniform(clip_key)))(clip_keys(key, clip_ids_BS))
    return draw_BS < share


def denoiser_job(
    config: DenoiserRun,
    cache: LatentCache,
    tokenizer: Tokenizer | PretrainedText | NoText,
    preview=None,
    folder: Path | None = None,
    share: tuple[int, int] = (0, 1),
) -> Job:
    """What the loop needs to train a denoiser on a latent cache; `folder` keeps the tokens of its captions.

    share: this process's part of each batch, see `distributed.share_of_batch`.
    """
    batches = packed_batches(
        cache, None if isinstance(tokenizer, PretrainedText) else tokenizer, config.packs, config.batch, config.seed,
        config.split, *share, config.captions, folder, first=distributed.first(),
    )  # fmt: skip
    return Job(
        name="transformer",
        specs=transformer_specs(config.model),
        loss=functools.partial(_job_loss, config),
        batches=lambda start, position: batches.stream(start, config.feed, Position(*position or ())),
        to_device=functools.partial(_to_device, config.diffusion.times),
        counts=functools.partial(batch_counts, config.model),
        clip_ids=lambda batch: _names(cache, batch["clip_ids_BS"]),
        preview=preview,
        note=str(batches.report()),
        shares=share[1],
    )


def _to_device(times: TimesConfig, batch: dict) -> Pack:
    """The batch as a Pack; stratified times need the place of each clip in the whole of it, all micro-batches."""
    return Pack(**batch, ranks_BS=jax.jit(batch_ranks)(batch["clip_ids_BS"]) if times.stratified else None)


def _names(cache: LatentCache, clip_ids_BS) -> list[str]:
    return sorted(set(cache.ids(np.flatnonzero(np.isin(cache.clip_ids, clip_ids_BS[clip_ids_BS > 0])))))


def _job_loss(config: DenoiserRun, params, pack: Pack, step, part):
    return denoiser_loss(config, params, pack, step)


def batch_counts(model: TransformerConfig, batch: dict) -> dict[str, float]:
    """Clips, real tokens, places for tokens and model FLOPs of a host batch."""
    grids = batch["grids_BS3"].astype(np.int64)
    lengths = grids.prod(-1)
    return {
        "clips": int((lengths > 0).sum()),
        "tokens": int(lengths.sum()),
        "places": batch["segments_BL"].size,
        "flops": train_flops(model, batch),
    }


def load_tokenizer(config: DenoiserRun, workdir: Path) -> Tokenizer | PretrainedText | NoText:
    """What turns captions into what the model of a run takes; UserError where its file is missing."""
    if config.model.text is None:
        return NoText()
    if name := config.model.text.pretrained:
        data = as_path(workdir) / "data.json"
        learnt_from = read_json(data)["text"] if data.exists() else None
        return PretrainedText(name, config.tokenizer.max_tokens, learnt_from)
    return tokenizers.load(as_path(workdir) / "tokenizer.json")


def prepare_tokenizer(config: DenoiserRun, cache: LatentCache, workdir: Path) -> Tokenizer | PretrainedText | NoText:
    """The run's tokenizer: none, the pretrained one, the one in `workdir`, or one learnt from the captions."""
    if config.model.text is None or config.model.text.pretrained or (as_path(workdir) / "tokenizer.json").exists():
        return load_tokenizer(config, workdir)
    tokenizer = tokenizers.train(captions_in_order(cache, cache.indices(config.split)), config.tokenizer)
    check(
        tokenizer.vocab_size <= config.model.text.vocabulary,
        f"config.model.text.vocabulary is {config.model.text.vocabulary}; the tokenizer has {tokenizer.vocab_size} ids",
    )
    return tokenizer
