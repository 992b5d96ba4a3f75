"""Train W.A.L.T: attention in windows of frames and of all frames in turn (Gupta et al. 2312.06662, table 8).

    sora-jax train --config=configs/walt.py:XL --workdir=runs/walt --config.latents=data/latents
    sora-jax sample --workdir=runs/walt --class=3,14 --size=128 --frames=17 --out=clips.mp4
    sora-jax sample --workdir=runs/k600 --video=clip.mp4 --extend=+12 --context=5 --out=longer.mp4
    sora-jax plan --config=configs/walt.py:t2v --topology=v5p:4x4x4
    sora-jax train --config=configs/walt.py:small --workdir=runs/walt_sprites --config.latents=data/sprites_latents
    sora-jax train --config=configs/walt.py:small_sr --workdir=runs/walt_sr --config.latents=data/sprites_low_latents
    sora-jax train --config=configs/walt.py:sr --workdir=runs/sr --config.latents=data/latents_256
    sora-jax train --config=configs/walt.py:sr2 --workdir=runs/sr2 --config.latents=data/latents_512
    sora-jax sample --workdir=runs/t2v --prompt="a fox" --height=128 --width=224 --then=runs/sr,runs/sr2 --out=a.mp4

    variant                    parameters  what it is
    configs/walt.py:L               313 M  UCF-101 by class, 17 frames of 128 x 128; the size of the paper's ablations
    configs/walt.py:XL              459 M  the same, the size of its results
    configs/walt.py:k600            313 M  Kinetics-600: 12 frames that follow 5 given ones
    configs/walt.py:imagenet        459 M  ImageNet by class, 256 x 256, with a modulation of its own in each block
    configs/walt.py:t2v             3.1 B  text to video, 17 frames of 128 x 128, with images in the same packs
    configs/walt.py:sr              1.3 B  clips of 17 frames of 128 x 224 to twice the size
    configs/walt.py:sr2             444 M  those of sr to twice the size: 17 frames of 512 x 896
    configs/walt.py:small           3.2 M  the sprites of configs/sprites.py, on two CPU cores
    configs/walt.py:small_sr        3.2 M  sprites of twice the size of given ones, on two CPU cores

Latents have 8 channels, of an autoencoder of 4 x 8 x 8 (1 x 8 x 8 for images); `small` takes those of
`configs/sprites.py:autoencoder`. Except in `small` a token is one latent position.

The recipe is the paper's: v-prediction over 1000 steps of linear betas, rescaled to end without signal; modulation of
rank 2; normalised queries and keys; self-conditioning of 0.9 of the clips; AdamW with a cosine schedule from 5e-4
(t2v: Adafactor, 2e-4, no averages in the paper; here one is kept, since samples are drawn from it); DDIM in 50 steps.
UCF-101 takes 60,000 steps of 256 clips, Kinetics-600 360 epochs of 512 (its 390,000 clips), ImageNet 350 epochs of 1024
images, t2v 550,000 steps of 512 packs, each a clip or five images. Warm-up, decays of averages and Adam's are not in
the paper. In `imagenet` windows are whole latents of 32 x 32, and images attend in windows of 8 x 8 in every other
block: with windows of 16 x 16, the default that the paper prints, the four quarters of an image would never meet.

Frames are given to `k600` and `t2v` (docs/tasks.md): the command above continues a clip as the paper does; with `t2v`
`--frames=29` or `41` with `--window=17 --context=5` makes a longer one. `--history-guidance` guides by given frames.
The shares of clips with given frames are not in the paper.

The runs of the cascade, `sr` and `sr2`, and `small_sr` read clips at half their height and width: their latents are of
`data encode --low`. The paper has 1.3 B and 419 M, without the encoder of captions, which has 27 M here. The half clips
have noise of a level from 0 to 0.3 in training, of 0.1 in sampling; the paper does not say these. `sr` takes patches of
2 x 2, `sr2` of 4 x 4 (table 8; the text of the paper has 2 x 2 for both).

What differs: positions in windows are rotary, not a learnt bias (0.6 M parameters of L, 0.7 M of XL); given frames are
clean tokens at time 0, not further channels beside a mask; half clips are brought to the size of the clip by a map of
each position alone. The paper reports an FVD on UCF-101 of 46 (L) and 36 (XL), an FID on ImageNet of 2.56 without
guidance. Time and quality: not measured here.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.models.walt_blocks import SIZES, WaltConfig
from sora_jax.train.denoiser import DenoiserRun

VARIANTS = ("XL", "L", "k600", "imagenet", "t2v", "sr", "sr2", "small", "small_sr")


def get_config(variant: str = "XL"):
    sizes = {"XL": lambda: ucf("XL"), "L": lambda: ucf("L")}
    variants = {**sizes, "k600": k600, "imagenet": imagenet, "t2v": t2v, "sr": sr, "sr2": sr2}
    variants |= {"small": small, "small_sr": small_sr}
    return choose("variant of configs/walt.py", variant or "XL", variants)()


def base():
    """Return what all variants share."""
    config = to_config_dict(DenoiserRun(model=WaltConfig()))
    config.model.self_conditioning = True
    diffusion = config.diffusion
    diffusion.process = "vp_linear_zero_snr"
    diffusion.prediction = "v"
    diffusion.times.distribution = "steps"
    diffusion.times.base_tokens = 0

    optim = config.optim
    optim.learning_rate = 5e-4
    optim.schedule = "cosine"
    optim.warmup_steps = 1000
    optim.ema = (0.9999,)

    config.loop.log_every = 50
    config.loop.save_every = 1000

    sampling = config.sampling
    sampling.solver.name = "ddim"
    sampling.spacing = "respaced"
    sampling.steps = "50"
    sampling.guidance.scale = 1.0
    return config


def sized(size: str):
    """Return a config with one of the paper's sizes."""
    config = base()
    depth, width, heads = SIZES[size]
    config.model.depth = depth
    config.model.width = width
    config.model.heads = heads
    return config


def ucf(size: str):
    config = sized(size)
    config.batch = 256
    config.model.text = None
    config.model.classes = 101
    config.packing.length = 1280
    config.packing.slots = 1
    config.loop.steps = 60_000
    config.preview.classes = (0, 25, 50, 75)
    config.preview.sizes = ((17, 128, 128),)
    return config


def k600():
    config = ucf("L")
    config.batch = 512
    config.model.classes = 0
    config.loop.steps = 280_000
    config.preview.classes = ()
    config.preview.sizes = ()

    given = config.diffusion.given
    given.first = 0.9
    given.first_frames = 2
    given.noise = 0.0
    given.dropped = 0.1
    return config


def imagenet():
    config = sized("L")
    config.batch = 1024
    model = config.model
    model.text = None
    model.classes = 1000
    model.spatial_window = (32, 32)
    model.image_identity = False
    model.positions = (1, 32, 32)
    model.adaln_rank = 0
    config.packing.length = 1024
    config.packing.slots = 1
    config.loop.steps = 437_500
    config.preview.classes = (207, 360, 387, 974)
    config.preview.sizes = ((1, 256, 256),)
    return config


def text_to_video(size: str):
    """Return what the three models of the cascade share."""
    config = sized(size)
    config.batch = 512
    model = config.model
    model.remat = "attention"
    model.text.pretrained = "google/t5-v1_1-xl"
    model.text.pretrained_width = 2048
    model.text.width = 1024
    model.text.head_width = 64
    config.tokenizer.max_tokens = 64
    config.packing.slots = 5
    config.packing.text_length = 320

    config.optim.method = "adafactor"
    config.optim.b1 = 0.0
    config.mesh.fsdp = -1
    config.mesh.data = 1
    config.sampling.guidance.scale = 7.5
    return config


def t2v():
    config = text_to_video("3B")
    config.packing.length = 1280

    given = config.diffusion.given
    given.first = 0.2
    given.headless = 0.1
    given.dropped = 0.1

    config.optim.learning_rate = 2e-4
    config.loop.steps = 550_000
    return config


def sr():
    return super_resolution("1.3B", 2, 675_000)


def sr2():
    return super_resolution("L", 4, 275_000)


def super_resolution(size: str, patch: int, steps: int):
    """Return a config with a grid of 5 x 16 x 28 tokens, whatever the size of a clip."""
    config = text_to_video(size)
    model = config.model
    model.low_resolution = True
    model.patch = (1, patch, patch)
    model.spatial_window = (16, 28)
    model.spatiotemporal_window = (8, 14)
    model.positions = (5, 16, 28)
    config.packing.length = 2304
    config.loop.steps = steps
    config.preview.sizes = ((17, 128 * patch, 224 * patch),)
    config.sampling.low_noise = 0.1
    return config


def small():
    config = base()
    config.batch = 16
    model = config.model
    model.depth = 6
    model.width = 160
    model.heads = 5
    model.patch = (1, 4, 4)
    model.spatial_window = (4, 4)
    model.spatiotemporal_window = (2, 2)
    model.positions = (5, 4, 4)
    model.position_theta = 10.0
    model.adaln_rank = 16
    model.input_skip = True
    model.remat = "none"
    model.unroll = 3

    model.text.vocabulary = 256
    model.text.width = 128
    model.text.depth = 1
    config.tokenizer.vocab = 256
    config.tokenizer.max_tokens = 44

    packing = config.packing
    packing.length = 160
    packing.slots = 2
    packing.text_length = 88

    config.diffusion.given.first = 0.1

    optim = config.optim
    optim.learning_rate = 2e-3
    optim.warmup_steps = 100
    optim.b2 = 0.95
    optim.ema = (0.995,)

    config.loop.steps = 3000
    config.loop.save_every = 250
    config.sampling.guidance.scale = 3.0
    return config


def small_sr():
    config = small()
    config.model.low_resolution = True
    config.sampling.low_noise = 0.1
    config.diffusion.given.first = 0.0
    return config
