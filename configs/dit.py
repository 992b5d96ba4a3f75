"""Train DiT exactly as published: class-conditional images (Peebles and Xie 2212.09748, tables 1 and 4, section 4).

    sora-jax train --config=configs/dit.py:XL/2 --workdir=runs/dit --config.latents=data/latents
    sora-jax train --config=configs/dit.py:B/4,512,in_context --workdir=runs/b4 --config.latents=data/latents
    sora-jax sample --workdir=runs/dit --class=207,360 --size=256 --steps=250 --guidance=4 --out=grid.png

A variant is SIZE/PATCH, optionally followed by the resolution and the conditioning, separated by commas. SIZE is S, B,
L or XL; PATCH is 2, 4 or 8; the resolution is 256 (default) or 512; the conditioning is adaln_zero (default), adaln,
cross_attention or in_context.

The recipe is that of the paper and its official code: latents of the Stable Diffusion autoencoder (4 channels, 1/8 of
the side; `sora-jax convert --from=diffusers-vae`); 1000 classes and a null class, label dropout 0.1; 1000 steps of
linear betas, epsilon prediction, learned variance; AdamW with constant learning rate 1e-4, betas 0.9 and 0.999, no
warm-up, no weight decay, no gradient clipping; batch 256; one EMA with decay 0.9999 from the first step. As in the
paper, each pack holds one image. To train on mixed sizes, pack several images together:
`--config.packing.length=1024 --config.packing.slots=16 --config.batch=64`.

Two differences: a latent is the mean of the autoencoder's posterior, encoded once, not sampled at each step; and images
are flipped horizontally only if the dataset was built with `sora-jax data build --mirror`.

ImageNet is not part of this project; `sora-jax data build --source=tfds:imagenet2012 --framing=square --mirror
--max-pixels=65536 --out=data/imagenet` reads a prepared copy. The paper reports FID-50K without guidance at 400,000
steps of 68.40 (S/2), 43.47 (B/2), 23.33 (L/2) and 19.47 (XL/2), on TPU v3 pods. Hardware, time and FID: not measured
here.
"""

from sora_jax.config import check, choose, to_config_dict
from sora_jax.models.conditioning import MODULATED
from sora_jax.models.transformer import SIZES
from sora_jax.train.denoiser import DenoiserRun

# Of 256 pixels; the docstring names further words.
VARIANTS = ("XL/2", "S/2", "S/4", "S/8", "B/2", "B/4", "B/8", "L/2", "L/4", "L/8", "XL/4", "XL/8")

PATCHES = ("2", "4", "8")
PIXELS = ("256", "512")
FACTOR = 8  # pixels to a latent position
SHOWN = (207, 360, 387, 974, 88, 979, 417, 279)  # ImageNet: golden retriever, otter, red panda, geyser, macaw...


def get_config(variant: str = "XL/2"):
    name, *changes = (variant or "XL/2").split(",")
    size, _, patch = name.partition("/")
    depth, width, heads = choose("size in the variant of configs/dit.py", size, SIZES)
    choose("patch in the variant of configs/dit.py", patch, dict.fromkeys(PATCHES))
    for change in changes:
        choose("variant of configs/dit.py", change, dict.fromkeys([*PIXELS, *MODULATED]))
    for group in (PIXELS, MODULATED):
        given = [change for change in changes if change in group]
        check(len(given) < 2, f"variant of configs/dit.py is {variant!r}; give one of {', '.join(given)}")
    pixels = next((int(change) for change in changes if change in PIXELS), 256)
    return dit(depth, width, heads, int(patch), pixels, next((c for c in changes if c in MODULATED), "adaln_zero"))


def dit(depth: int, width: int, heads: int, patch: int, pixels: int, conditioning: str):
    config = to_config_dict(DenoiserRun())
    side = pixels // FACTOR
    check(side % patch == 0, f"patch is {patch}; it must divide {side}")
    config.batch = 256

    model = config.model
    model.depth = depth
    model.width = width
    model.heads = heads
    model.patch = (1, patch, patch)
    model.latent_channels = 4
    model.text = None
    model.classes = 1000
    model.conditioning = conditioning
    model.rotary = False
    model.qk_norm = False
    model.sincos_positions = True
    model.sincos_axes = "xy"
    model.learned_variance = True
    model.step_times = True
    model.joint_qkv_init = True

    config.packing.length = (side // patch) ** 2
    config.packing.slots = 1

    diffusion = config.diffusion
    diffusion.process = "vp_linear"
    diffusion.prediction = "eps"
    diffusion.caption_dropout = 0.1
    diffusion.times.distribution = "steps"
    diffusion.times.base_tokens = 0

    optim = config.optim
    optim.learning_rate = 1e-4
    optim.schedule = "constant"
    optim.warmup_steps = 0
    optim.clip_norm = 0.0
    optim.b1 = 0.9
    optim.b2 = 0.999
    optim.weight_decay = 0.0
    optim.ema = (0.9999,)
    optim.ema_warmup = False

    config.loop.steps = 400_000
    config.loop.log_every = 100
    config.loop.save_every = 5000

    config.preview.classes = SHOWN
    config.preview.sizes = ((1, pixels, pixels),)

    sampling = config.sampling
    sampling.solver.name = "ddpm"
    sampling.spacing = "respaced"
    sampling.steps = "250"
    sampling.guidance.scale = 4.0
    sampling.guidance.channels = 3  # of 4, as the official code does
    return config
