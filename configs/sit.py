"""SiT: the transformer of DiT on continuous paths (Ma et al. 2401.08740, sections 3 and 4).

    sora-jax train --config=configs/sit.py:B/2 --workdir=runs/sit --config.latents=data/latents
    sora-jax train --config=configs/sit.py:XL/2,trigonometric --workdir=runs/sit --config.latents=data/latents --dry-run
    sora-jax sample --workdir=runs/sit --class=207,360 --size=256 --guidance=4 --out=grid.png
    sora-jax sample --workdir=runs/sit --class=207,360 --size=256 --solver=euler_sde --steps=250 --out=grid.png

A variant is SIZE/PATCH as in configs/dit.py, then linear (the default) or trigonometric (the paper's GVP), and 256 or
512, with commas between. The velocity of the path is predicted, times are uniform, the rest is DiT's recipe. Two
samplers, as in the paper at 250 evaluations: Heun on the ODE, which is the default here (125 steps), and
Euler-Maruyama on the SDE.

What differs from the official code: time runs from data (0) to noise (1), as everywhere in this project; the network
sees 1000 t, not t; and there is no second half of the output, which that code computes and leaves unused. On the SDE
its diffusion coefficient "sigma" stands before the score, with sqrt(2 sigma) dW: twice the noise of `sigma` here, where
w = b as in the paper; and its last step goes down the drift alone from t = 0.04 (its "Mean"), where the last step here,
from t = 1 / 250, gives the model's x_0 (its "Tweedie").

The paper's FID-50K at 400,000 steps, without guidance: 57.6 (S/2), 33.0 (B/2), 18.8 (L/2), 17.2 (XL/2), against
68.4, 43.5, 23.3 and 19.5 of DiT. They were not measured here.
"""

from sora_jax.config import check, choose, to_config_dict
from sora_jax.models.transformer import SIZES
from sora_jax.train.denoiser import DenoiserRun

PATHS = {"linear": "linear_flow", "trigonometric": "trigonometric"}
PATCHES = ("2", "4", "8")
PIXELS = ("256", "512")
FACTOR = 8  # pixels to a latent position
SHOWN = (207, 360, 387, 974, 88, 979, 417, 279)


def get_config(variant: str = "XL/2"):
    name, *changes = (variant or "XL/2").split(",")
    size, _, patch = name.partition("/")
    depth, width, heads = choose("size in the variant of configs/sit.py", size, SIZES)
    choose("patch in the variant of configs/sit.py", patch, dict.fromkeys(PATCHES))
    for change in changes:
        choose("variant of configs/sit.py", change, dict.fromkeys([*PIXELS, *PATHS]))
    for group in (PIXELS, PATHS):
        given = [change for change in changes if change in group]
        check(len(given) < 2, f"variant of configs/sit.py is {variant!r}; give one of {', '.join(given)}")
    pixels = next((int(change) for change in changes if change in PIXELS), 256)
    return sit(depth, width, heads, int(patch), pixels, PATHS[next((c for c in changes if c in PATHS), "linear")])


def sit(depth: int, width: int, heads: int, patch: int, pixels: int, process: str):
    config = to_config_dict(DenoiserRun())
    side = pixels // FACTOR
    check(side % patch == 0, f"patch is {patch}; it must divide {side}")
    config.batch = 256
    model = config.model
    model.depth, model.width, model.heads, model.patch = depth, width, heads, (1, patch, patch)
    model.latent_channels, model.text, model.classes = 4, None, 1000
    model.rotary, model.qk_norm, model.sincos_positions, model.sincos_axes = False, False, True, "xy"
    model.joint_qkv_init = True
    config.packing.length, config.packing.slots = (side // patch) ** 2, 1
    diffusion = config.diffusion
    diffusion.process, diffusion.prediction, diffusion.caption_dropout = process, "velocity", 0.1
    diffusion.times.distribution, diffusion.times.base_tokens = "uniform", 0
    optim = config.optim
    optim.learning_rate, optim.schedule, optim.warmup_steps, optim.clip_norm = 1e-4, "constant", 0, 0.0
    optim.b1, optim.b2, optim.weight_decay, optim.ema, optim.ema_warmup = 0.9, 0.999, 0.0, (0.9999,), False
    config.loop.steps, config.loop.log_every, config.loop.save_every = 400_000, 100, 5000
    config.preview.classes, config.preview.sizes = SHOWN, ((1, pixels, pixels),)
    config.sampling.solver.name, config.sampling.steps = "heun", "125"
    config.sampling.guidance.scale, config.sampling.guidance.channels = 4.0, 3  # of 4, as the official code does
    return config
