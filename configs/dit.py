"""DiT to the letter: class-conditional images (Peebles and Xie 2212.09748, tables 1 and 4, section 4).

    sora-jax train --config=configs/dit.py:XL/2 --workdir=runs/dit --config.latents=data/latents
    sora-jax train --config=configs/dit.py:B/4,512,in_context --workdir=runs/b4 --config.latents=data/latents
    sora-jax sample --workdir=runs/dit --class=207,360 --size=256 --steps=250 --guidance=4 --out=grid.png

A variant is SIZE/PATCH, then what differs from 256 pixels and adaLN-Zero: SIZE is S, B, L or XL, PATCH 2, 4 or 8,
then 256 or 512, then adaln_zero, adaln, cross_attention or in_context, with commas between.

The recipe of the paper and its official code: latents of the Stable Diffusion autoencoder (4 channels, 1/8 of the
side; `sora-jax convert --from=diffusers-vae`), 1000 classes and one row for none, taken in 10 % of the draws; 1000
steps of linear betas, noise predicted, variance learned; AdamW at a constant 1e-4, betas 0.9 and 0.999, no warm-up, no
weight decay, no clipping; 256 images a step; one average of the weights, decay 0.9999 from the first step on. An image
is a pack of its own, as in the paper. To train on mixed sizes, give packs that hold several images:
`--config.packing.length=1024 --config.packing.slots=16 --config.batch=64`.

What differs: a latent is the mean of the autoencoder's posterior, encoded once, not a draw from it for each step, and
pictures are mirrored only if the dataset was built so (`sora-jax data build --mirror`).

ImageNet is not part of this project; `sora-jax data build --source=tfds:imagenet2012 --framing=square --mirror
--max-pixels=65536 --out=data/imagenet` reads it where it has been prepared. The paper's numbers at 400,000 steps,
without guidance, are FID-50K 68.40 (S/2), 43.47 (B/2), 23.33 (L/2) and 19.47 (XL/2), on TPU v3 pods; they were not
measured here.
"""

from sora_jax.config import check, choose, to_config_dict
from sora_jax.models.conditioning import MODULATED
from sora_jax.models.transformer import SIZES
from sora_jax.train.denoiser import DenoiserRun

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
    model.depth, model.width, model.heads, model.patch = depth, width, heads, (1, patch, patch)
    model.latent_channels, model.text, model.classes, model.conditioning = 4, None, 1000, conditioning
    model.rotary, model.qk_norm, model.sincos_positions, model.sincos_axes = False, False, True, "xy"
    model.learned_variance, model.step_times, model.joint_qkv_init = True, True, True
    config.packing.length, config.packing.slots = (side // patch) ** 2, 1
    diffusion = config.diffusion
    diffusion.process, diffusion.prediction, diffusion.caption_dropout = "vp_linear", "eps", 0.1
    diffusion.times.distribution, diffusion.times.base_tokens = "steps", 0
    optim = config.optim
    optim.learning_rate, optim.schedule, optim.warmup_steps, optim.clip_norm = 1e-4, "constant", 0, 0.0
    optim.b1, optim.b2, optim.weight_decay, optim.ema, optim.ema_warmup = 0.9, 0.999, 0.0, (0.9999,), False
    config.loop.steps, config.loop.log_every, config.loop.save_every = 400_000, 100, 5000
    config.preview.classes, config.preview.sizes = SHOWN, ((1, pixels, pixels),)
    sampling = config.sampling
    sampling.solver.name, sampling.spacing, sampling.steps = "ddpm", "respaced", "250"
    sampling.guidance.scale, sampling.guidance.channels = 4.0, 3  # of 4, as the official code does
    return config
