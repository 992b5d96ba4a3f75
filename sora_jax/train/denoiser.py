"""Training the denoiser: packed latents with captions in, a velocity (or noise, or clean patches) out."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import check, read_json
from sora_jax.data.feeding import tokenizer as tokenizers
from sora_jax.data.feeding.epochs import Position
from sora_jax.data.feeding.pipeline import PackedBatches, PackingShares
from sora_jax.data.feeding.texts import captions_in_order, parse_mix
from sora_jax.data.feeding.tokenizer import NoText, Tokenizer, TokenizerConfig
from sora_jax.data.packing.packs import PackingConfig, token_counts
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.drawn import DrawnClips, DrawnConfig
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.store import ClipStore
from sora_jax.diffusion.guidance import GuidanceConfig
from sora_jax.diffusion.keys import Purpose, clip_uniforms, step_key, token_noise
from sora_jax.diffusion.loss import Corruption, LossSpec, denoising_loss, loss_weight
from sora_jax.diffusion.prediction import Denoise, check_pair
from sora_jax.diffusion.process import input_scale, process_named
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.diffusion.self_conditioning import DenoiseFrom, Estimate, in_two_passes
from sora_jax.diffusion.times import ClipBatch, TimesConfig, batch_ranks, draw_times, per_token
from sora_jax.diffusion.weights import WeightConfig, check_weight
from sora_jax.files import as_path
from sora_jax.models.denoiser import (
    AnyDenoiser,
    DenoiserConfig,
    RunTrunk,
    denoise,
    denoiser_specs,
    reads_estimate,
    reads_low,
    room_multiple,
    train_flops,
)
from sora_jax.models.pretrained import PretrainedText
from sora_jax.models.transformer import TransformerConfig
from sora_jax.nn.pack import Pack, drop_captions, per_slot, slot_of
from sora_jax.nn.params import count
from sora_jax.parallel import distributed
from sora_jax.train.adapt import LoraConfig, matches, split_specs
from sora_jax.train.frozen import recorded_fingerprint
from sora_jax.train.given import GivenConfig, draw_given
from sora_jax.train.loop import Job, Preview
from sora_jax.train.low_resolution import with_low_noise
from sora_jax.train.run_config import RunConfig
from sora_jax.train.state import MODEL, Group
from sora_jax.train.step import LossResult

NOISE_BINS = 10
Text = Tokenizer | PretrainedText | NoText  # what turns captions into what a model takes


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Configure the noise process and the loss of training."""

    process: str = "linear_flow"  # noise process, see docs/training.md
    prediction: str = "velocity"  # what the network predicts: velocity, eps, x0, v, score or edm
    times: TimesConfig = TimesConfig()  # how noise levels are drawn
    weight: WeightConfig = WeightConfig()  # how much the error counts at each noise level
    caption_dropout: float = 0.1  # share of clips trained on without caption and class, for guidance
    given: GivenConfig = GivenConfig()  # what is given of clips: for extension, loops, in-painting and the like
    # Share of clips trained on with an estimate of the clean tokens, for a network with `model.self_conditioning`; the
    # others, and held-out clips, have none.
    self_conditioning: float = 0.9
    # Largest noise level of the low resolution of clips, for a network with `model.low_resolution`: that of each clip
    # is drawn from 0 to it, that of held-out clips is half of it.
    low_noise: float = 0.3

    def __post_init__(self):
        check_pair(self.process, self.prediction)
        check_weight(self.weight.name, self.prediction)
        check(
            0 <= self.caption_dropout < 1,
            f"diffusion.caption_dropout is {self.caption_dropout}; it must be in [0, 1)",
        )
        for name in ("self_conditioning", "low_noise"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"diffusion.{name} is {value}; it must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class PreviewConfig:
    """Configure the clips that are sampled while training; prompts or classes and sizes are paired in turn."""

    clips: int = 0  # so many clips of the data, held-out ones if there are any, give their captions and sizes
    prompts: tuple[str, ...] = ()  # captions to sample
    classes: tuple[int, ...] = ()  # classes to sample, in place of prompts
    sizes: tuple[tuple[int, int, int], ...] = ()  # (frames, height, width) of the clips
    steps: str = ""  # solver steps; "": those of `sampling`
    fps: float = 8.0  # frames a second of the files

    def __post_init__(self):
        check(not (self.prompts and self.classes), "preview.prompts and preview.classes are both given; give one")
        check(self.clips >= 0, f"preview.clips is {self.clips}; it must be at least 0")
        others = "preview.prompts or preview.classes are"
        check(not self.clips or not (self.prompts or self.classes), f"preview.clips and {others} both given; give one")
        check(self.sizes or self.clips or not self.any, "preview.sizes is empty; previews need at least one size")
        check(self.fps > 0, f"preview.fps is {self.fps}; it must be positive")

    @property
    def any(self) -> bool:
        """True if there is anything to sample."""
        return bool(self.prompts or self.classes or self.clips)


@dataclasses.dataclass(frozen=True)
class HeldOutConfig:
    """Configure the loss of held-out clips, which is measured while training: see `train.held_out`.

    A measurement costs `levels` forward passes of the clips, a third of as many steps on them.
    """

    every: int = 500  # steps between measurements, also after the last step; 0: never
    clips: int = 64  # held-out clips at most, evenly spread over the latent cache
    levels: int = 4  # noise levels of each clip, spread over the distribution of training times

    def __post_init__(self):
        check(self.every >= 0, f"held_out.every is {self.every}; it must be 0 (never) or a number of steps")
        for name in ("clips", "levels"):
            value = getattr(self, name)
            check(value > 0, f"held_out.{name} is {value}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class DenoiserRun(RunConfig):
    """Configure a training run of the denoiser; `batch` counts packs."""

    kind: Literal["denoiser"] = "denoiser"
    latents: str = ""  # a folder made by `sora-jax data encode`
    drawn: DrawnConfig | None = None  # in place of latents: clips of a world, drawn while training, their pixels learnt
    captions: str = "first"  # which caption a clip has in an epoch: first, any, dalle3, sd3, or original=1,synthetic=3
    model: AnyDenoiser = TransformerConfig()
    lora: LoraConfig = LoraConfig()  # low-rank adapters, to train in place of the network; needs init.weights
    tokenizer: TokenizerConfig = TokenizerConfig()
    packing: PackingConfig = PackingConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    preview: PreviewConfig = PreviewConfig()
    held_out: HeldOutConfig = HeldOutConfig()
    sampling: SamplingConfig = SamplingConfig(guidance=GuidanceConfig(3.0))  # how it is sampled unless asked otherwise

    def __post_init__(self):
        super().__post_init__()
        parse_mix(self.captions)
        both = "latents is {!r} and drawn is given; leave one of them out"
        check(not (self.latents and self.drawn), both.format(self.latents))
        check(
            not self.diffusion.given.levels or self.packing.rows_per_clip > 2,
            f"packing.rows_per_clip is {self.packing.rows_per_clip}; with diffusion.given.levels it must be at least "
            "3: the token frames of the longest clip, and one more",
        )
        given, guides = self.diffusion.given, self.model.guides
        check(
            guides or not given.guides,
            f"model.guides is False; diffusion.given.key_frames = {given.key_frames} and sketches = {given.sketches} "
            "need True",
        )
        check(guides or not self.packing.guides, "packing.guides is True; it must be left out, model.guides says it")
        check(not self.packing.low, "packing.low is True; it must be left out, model.low_resolution says it")
        alone = self.packing.multiple == (1, 1)
        check(alone, f"packing.multiple is {self.packing.multiple}; it must be (1, 1), as model.name says it")
        check(
            not guides or self.model.patch[0] == 1,
            f"model.guides is True; model.patch[0] must be 1, a latent frame to a token, not {self.model.patch[0]}",
        )
        self._check_preview()
        denoiser_parts(self)
        check(
            self.packing.patch in (None, self.model.patch),
            f"packing.patch is {self.packing.patch}; leave it out, or give model.patch = {self.model.patch}",
        )

    def _check_preview(self) -> None:
        """Raise now what the first preview would otherwise raise, hours into the training."""
        preview, known = self.preview, self.model.classes
        for name in ("prompts", "clips"):
            given = getattr(preview, name)
            check(self.model.text or not given, f"preview.{name} are given; a model without text has classes")
        for label in preview.classes:
            check(
                0 <= label < known,
                f"preview.classes names {label}; with model.classes = {known} each must be below that",
            )
        if preview.steps:
            dataclasses.replace(self.sampling, steps=preview.steps)

    @property
    def first_stage(self) -> str:
        """Return what `load_autoencoder` reads: the folder of the latents, or the name of a first stage of pixels."""
        return self.drawn.first_stage if self.drawn else self.latents

    @property
    def packs(self) -> PackingConfig:
        """`packing` with the model's patch; a model without text has one null token for each clip."""
        text_length = self.packing.text_length if self.model.text else self.packing.slots
        rows = max(self.packing.rows_per_clip, 2 if self.diffusion.given.any else 1)
        return dataclasses.replace(
            self.packing,
            patch=self.model.patch,
            text_length=text_length,
            rows_per_clip=rows,
            guides=self.model.guides,
            low=reads_low(self.model),
            multiple=room_multiple(self.model),
        )


def open_latents(config: DenoiserRun) -> LatentCache:
    """Open what a run is trained on: clips of a world, or a latent cache; UserError where there is no such cache."""
    if config.drawn:
        return DrawnClips(config.drawn, recorded_fingerprint(config.first_stage) or "")
    return LatentCache(config.latents)


def denoiser_parts(config: DenoiserRun) -> tuple[dict, dict]:
    """Declare the network, with its text encoder: what is trained, and what is fixed."""
    return split_specs(denoiser_specs(config.model), config.freeze, config.init, config.lora)


def denoiser_groups(config: DenoiserRun) -> dict[str, Group]:
    """Declare what is trained."""
    return {MODEL: Group(denoiser_parts(config)[0], config.optim)}


def denoiser_loss(
    config: DenoiserRun, params: dict, frozen: Any, pack: Pack, step: jax.Array, part: jax.Array
) -> LossResult:
    """Return the sum of the denoising loss over the real tokens of a batch, its weight, and means: see `make_step`.

    Times, noise, what is given, and dropped captions and classes are functions of (seed, step, clip) alone.
    """
    diffusion = config.diffusion
    key = functools.partial(step_key, config.seed, step)
    process = process_named(diffusion.process)
    clips = ClipBatch(pack.clip_ids_BS, pack.grids_BS3.prod(-1), pack.ranks_BS)
    times_BS = draw_times(diffusion.times, process, key(Purpose.TIME), clips)
    times_BR, rows_BL = per_slot(times_BS, pack.row_slots_BR), pack.rows_BL
    weight_BL = loss_weight(pack.segments_BL, times_BR, rows_BL)
    if diffusion.given.any:
        keys = key(Purpose.GIVEN), key(Purpose.FRAME_TIMES)
        given_BL, rows_BL, times_BR = draw_given(diffusion.given, diffusion.times, process, keys, pack, times_BS)
        weight_BL = jnp.where(given_BL, 0.0, weight_BL)
        pack = dataclasses.replace(pack, rows_BL=rows_BL)
    clip_ids_BL = per_slot(pack.clip_ids_BS, slot_of(pack.segments_BL))
    assert pack.tokens_BLP is not None  # what is trained on is there
    eps_BLP = token_noise(key(Purpose.NOISE), clip_ids_BL, pack.index_BL, pack.tokens_BLP.shape[-1])
    known = drop_captions(pack, _draw(diffusion.caption_dropout, key(Purpose.CAPTION_DROPOUT), pack.clip_ids_BS))
    if reads_low(config.model):
        low_times_BS = diffusion.low_noise * clip_uniforms(key(Purpose.LOW_TIME), pack.clip_ids_BS)
        known = with_low_noise(process, known, key(Purpose.LOW_NOISE), low_times_BS)
    model: Denoise = network(params[MODEL], config, known)
    if reads_estimate(config.model) and diffusion.self_conditioning:
        chosen_BS = _draw(diffusion.self_conditioning, key(Purpose.SELF_CONDITIONING), pack.clip_ids_BS)
        first = network(jax.lax.stop_gradient(params[MODEL]), config, known)
        estimate = Estimate(process, diffusion.prediction, rows_BL)
        chosen_BL1 = per_slot(chosen_BS, slot_of(pack.segments_BL))[..., None]
        model = in_two_passes(estimate, first, network(params[MODEL], config, known), chosen_BL1)
    spec = LossSpec(process, diffusion.prediction, diffusion.weight, config.model.learned_variance, NOISE_BINS)
    data = Corruption(pack.tokens_BLP.astype(jnp.float32), eps_BLP, times_BR, rows_BL)
    sums = denoising_loss(spec, model, data, weight_BL)
    means = {"loss_by_noise": (sums.loss_bins, sums.weight_bins)}
    if config.model.learned_variance:
        means |= {"mse": (sums.mse, sums.weight), "vlb_bits": (sums.vlb, sums.weight)}
    return {MODEL: sums.loss}, ({MODEL: sums.weight}, means)


def network(
    params: dict, config: DenoiserRun, pack: Pack, condition: Any = None, run_trunk: RunTrunk | None = None
) -> DenoiseFrom:
    """Bind everything but noisy tokens, noise levels and an estimate; the input is scaled as the process asks.

    condition: the result of `encode_condition`, which is computed at every call when None. run_trunk: see `denoise`.
    """
    process = process_named(config.diffusion.process)

    def predict(x_BLP: jax.Array, t_BR: jax.Array, previous_BLP: jax.Array | None = None, /) -> jax.Array:
        scale_BL1 = input_scale(process, per_token(t_BR, pack.rows_BL))[:, :, None]
        return denoise(params, config.model, pack, scale_BL1 * x_BLP, t_BR, condition, run_trunk, previous_BLP)

    return predict


def _draw(share: float, key: jax.Array, clip_ids_BS: jax.Array) -> jax.Array:
    return clip_uniforms(key, clip_ids_BS) < share


def denoiser_job(
    config: DenoiserRun,
    cache: LatentCache,
    text: Text,
    preview: Preview | None = None,
    folder: Path | None = None,
    share: ShardSpec = ShardSpec(),
) -> Job:
    """Make the job that trains a denoiser on a latent cache.

    folder: keeps the tokens of all captions. share: this process's part of each batch.
    """
    given = config.diffusion.given
    _check_guides(given, cache)
    batches = PackedBatches(
        cache,
        None if isinstance(text, PretrainedText) else text,
        config.packs,
        config.batch,
        config.seed,
        config.split,
        share,
        config.captions,
        folder,
        first=distributed.first(),
        shares=PackingShares(given.headless, given.key_frames, given.sketches),
    )
    report = batches.report()
    trained, fixed = map(count, denoiser_parts(config))
    return Job(
        name=config.kind,
        groups=denoiser_groups(config),
        loss=functools.partial(denoiser_loss, config),
        batches=lambda start, position: batches.stream(start, config.feed, Position(*position or ())),
        to_device=functools.partial(to_pack, config.diffusion.times),
        counts=functools.partial(batch_counts, config.model, trained=trained / (trained + fixed)),
        clip_ids=lambda batch: clip_names(cache, batch["clip_ids_BS"]),
        preview=preview,
        note=str(report),
        share=share,
        epoch=report.packs / report.clips * batches.clip_index.weights.sum(dtype=np.float64) / config.batch,
    )


def check_text(cache: LatentCache, name: str, width: int, max_tokens: int) -> None:
    """Raise UserError unless a cache has text of this encoder (none for the empty name), width and length."""
    text, have = cache.info.text, "no text of a pretrained encoder"
    if text:
        have = f"text of {text.name!r}, width {text.width}, at most {text.max_tokens} tokens"
    wanted = f"--text-encoder={name} --text-tokens={max_tokens}" if name else "no --text-encoder"
    check(
        (text.name, text.width, text.max_tokens) == (name, width, max_tokens) if text else not name,
        f"config.model.text.pretrained is {name!r}, pretrained_width {width}, config.tokenizer.max_tokens "
        f"{max_tokens}; the latent cache {cache.path} has {have}: make it again with {wanted}, or change the config",
    )


def _check_guides(given: GivenConfig, cache: LatentCache) -> None:
    """Raise a UserError where the cache does not hold the guides that the config asks for."""
    for name, held in vars(cache.info.guides).items():
        share = getattr(given, name)
        again = f"make it with `sora-jax data encode ... --{name.replace('_', '-')}=K`, K of each clip"
        check(held or not share, f"diffusion.given.{name} is {share}; the latent cache {cache.path} has none: {again}")


def to_pack(times: TimesConfig, batch: dict) -> Pack:
    """Make a Pack of a placed batch; stratified times need the rank of each clip in all of it, all micro-batches."""
    return Pack(**batch, ranks_BS=jax.jit(batch_ranks)(batch["clip_ids_BS"]) if times.stratified else None)


def clip_names(store: ClipStore, clip_ids_BS: np.ndarray) -> list[str]:
    """Name the clips of a batch. Ids of copies name none, and the first one of each clip is there, too."""
    return sorted(set(store.ids(np.flatnonzero(np.isin(store.clip_ids, clip_ids_BS[clip_ids_BS > 0])).tolist())))


def batch_counts(model: DenoiserConfig, batch: dict, trained: float = 1.0) -> dict[str, float]:
    """Count clips, real tokens, capacity for tokens and model FLOPs of a host batch; trained: see `train_flops`."""
    lengths = token_counts(batch)
    return {
        "clips": int((lengths > 0).sum()),
        "tokens": int(lengths.sum()),
        "capacity": batch["segments_BL"].size,
        "flops": train_flops(model, batch, trained),
    }


def load_tokenizer(config: DenoiserRun, workdir: Path) -> Text:
    """Load what turns captions into what the model of a run takes; UserError where its file is missing."""
    if config.model.text is None:
        return NoText()
    if name := config.model.text.pretrained:
        data = as_path(workdir) / "data.json"
        learnt_from = read_json(data)["text"] if data.exists() else None
        return PretrainedText(name, config.tokenizer.max_tokens, learnt_from)
    return tokenizers.load(as_path(workdir) / "tokenizer.json")


def prepare_tokenizer(config: DenoiserRun, cache: LatentCache, workdir: Path) -> Text:
    """Return the run's tokenizer: none, the pretrained one, the one in `workdir`, or one learnt from the captions.

    A run that begins with the token table of another has that one's tokenizer.
    """
    if config.model.text is None or config.model.text.pretrained or (as_path(workdir) / "tokenizer.json").exists():
        return load_tokenizer(config, workdir)
    if config.init.weights and not matches("text/table", config.init.renew):
        tokenizer = tokenizers.load(config.init.source[0] / "tokenizer.json")
        tokenizer = dataclasses.replace(
            tokenizer, config=dataclasses.replace(tokenizer.config, max_tokens=config.tokenizer.max_tokens)
        )
    else:
        tokenizer = tokenizers.train(captions_in_order(cache, cache.indices(config.split)), config.tokenizer)
    check(
        tokenizer.vocab_size <= config.model.text.vocabulary,
        f"config.model.text.vocabulary is {config.model.text.vocabulary}; the tokenizer has {tokenizer.vocab_size} ids",
    )
    return tokenizer
