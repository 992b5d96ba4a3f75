"""Train CRATE, the white-box transformer (Yu et al. 2306.01129), as a denoiser of latents or as a classifier of images.

    sora-jax train --config=configs/crate.py:small --workdir=runs/crate --config.latents=data/sprites_latents
    sora-jax train --config=configs/crate.py:S --workdir=runs/crate_S --config.latents=data/latents
    sora-jax data build --source=tfds:NAME --out=data/pictures --multiple=4 --max-pixels=1024
    sora-jax train --config=configs/crate.py:classifier --workdir=runs/classifier --config.data=data/pictures
    sora-jax data build --source=tfds:imagenet2012 --framing=square --mirror --max-pixels=50176 --out=data/imagenet
    sora-jax train --config=configs/crate.py:classifier_T --workdir=runs/T --config.data=data/imagenet

small (default): text to video of the clips of configs/sprites.py on two CPU cores, in the recipe of its transformer and
with as many parameters, 3.2 million. T, S, B, L: the sizes of the paper as denoisers of latents of 16 channels;
`--config.packing.length` must hold the longest clip.

classifier: images of at most 32 x 32 pixels in 10 classes (`--config.model.image`, `--config.model.classes`), on two
CPU cores. classifier_T, classifier_S, classifier_B, classifier_L: the networks of the paper for images of 224 x 224 in
1,000 classes and patches of 16 x 16, with 6.1, 13.1, 22.8 and 77.6 million parameters, trained as in the paper: 150
epochs with Lion, learning rate 2.4e-4, weight decay 0.5, batch 2048, label smoothing 0.1. It reports a top-1 accuracy
on ImageNet-1K of 66.7, 69.2, 70.8 and 71.3 %. Its random crops are left out here; mirrored images come from the build.
Images need a class each: from TFDS, or a column `label`.

Hardware: two CPU cores for small and classifier, one accelerator or several for the others. Time and quality: not
measured here.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.models.crate import SIZES, CrateConfig
from sora_jax.train.classifier import ClassifierRun
from sora_jax.train.denoiser import DenoiserRun

VARIANTS = (
    "small", "T", "S", "B", "L", "classifier", "classifier_T", "classifier_S", "classifier_B", "classifier_L"
)  # fmt: skip


def get_config(variant: str = "small"):
    variant = choose("variant of configs/crate.py", variant or "small", {name: name for name in VARIANTS})
    kind, _, size = variant.rpartition("_")
    if variant == "small":
        return small()
    if variant == "classifier":
        return classifier()
    depth, width, heads = SIZES[size]
    config = imagenet() if kind else latents()
    config.model.depth = depth
    config.model.width = width
    config.model.heads = heads
    return config


def small():
    config = to_config_dict(DenoiserRun(model=CrateConfig()))
    config.batch = 16

    model = config.model
    model.depth = 8
    model.width = 220
    model.heads = 5
    model.latent_channels = 8
    model.patch = (1, 4, 4)
    model.position_theta = 10.0
    model.remat = "none"
    model.unroll = 8

    model.text.vocabulary = 256
    model.text.width = 128
    model.text.depth = 1
    config.tokenizer.vocab = 256
    config.tokenizer.max_tokens = 44

    packing = config.packing
    packing.length = 160
    packing.slots = 2
    packing.text_length = 88
    packing.rows_per_clip = 6  # the token frames of 9 frames, and one row for what is given

    config.diffusion.times.base_tokens = 20

    given = config.diffusion.given
    given.first = 0.1
    given.last = 0.05
    given.ends = 0.05
    given.frames = 0.05
    given.boxes = 0.05
    given.levels = 0.05
    given.headless = 0.05

    optim = config.optim
    optim.learning_rate = 2e-3
    optim.schedule = "cosine"
    optim.warmup_steps = 100
    optim.b2 = 0.95
    optim.ema = (0.995,)

    config.loop.steps = 3000
    config.loop.save_every = 250
    config.loop.preview_every = 500

    config.sampling.guidance.scale = 3.0
    return config


def latents():
    config = to_config_dict(DenoiserRun(model=CrateConfig()))
    config.batch = 32

    model = config.model
    model.text.vocabulary = 8192
    model.text.width = 512
    model.text.depth = 4
    config.tokenizer.vocab = 8192
    config.tokenizer.max_tokens = 128

    packing = config.packing
    packing.length = 2048
    packing.slots = 32
    packing.text_length = 1024

    optim = config.optim
    optim.learning_rate = 1e-4
    optim.warmup_steps = 1000
    optim.ema = (0.9999,)

    config.loop.steps = 400_000
    config.loop.log_every = 50
    config.loop.save_every = 2000
    return config


def classifier():
    config = to_config_dict(ClassifierRun())
    config.batch = 16

    model = config.model
    model.depth = 6
    model.width = 192
    model.heads = 6
    model.patch = 4
    model.image = (32, 32)
    model.classes = 10
    model.remat = "none"

    config.packing.length = 512
    config.packing.slots = 8

    optim = config.optim
    optim.learning_rate = 1e-3
    optim.schedule = "cosine"
    optim.warmup_steps = 200
    optim.weight_decay = 0.05

    config.loop.steps = 5000
    config.loop.preview_every = 500
    return config


def imagenet():
    config = to_config_dict(ClassifierRun())
    config.batch = 512  # packs of four images

    config.packing.length = 784
    config.packing.slots = 4

    optim = config.optim
    optim.method = "lion"
    optim.learning_rate = 2.4e-4
    optim.schedule = "cosine"
    optim.warmup_steps = 3100  # 5 epochs
    optim.weight_decay = 0.5
    optim.ema = (0.9999,)

    config.loop.steps = 94_000  # 150 epochs
    config.loop.log_every = 50
    config.loop.save_every = 2000
    config.loop.preview_every = 2000
    return config
