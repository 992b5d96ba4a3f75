"""Train SiT: the transformer of DiT on continuous-time interpolants (Ma et al. 2401.08740, sections 3 and 4).

    sora-jax train --config=configs/sit.py:B/2 --workdir=runs/sit --config.latents=data/latents
    sora-jax train --config=configs/sit.py:XL/2,trigonometric --workdir=runs/sit --config.latents=data/latents --dry-run
    sora-jax sample --workdir=runs/sit --class=207,360 --size=256 --guidance=4 --out=grid.png
    sora-jax sample --workdir=runs/sit --class=207,360 --size=256 --solver=euler_sde --steps=250 --out=grid.png

A variant is SIZE/PATCH as in configs/dit.py, optionally followed by the path, linear (default) or trigonometric (GVP in
the paper), and the resolution, 256 (default) or 512, separated by commas. The model predicts the velocity of the path
at uniformly sampled times; the rest is the recipe of DiT. As in the paper there are two samplers of 250 function
evaluations: Heun on the ODE (default, 125 steps) and Euler-Maruyama on the SDE.

Differences from the official code: time runs from data (0) to noise (1), as everywhere in this project; the network
is conditioned on 1000 t (`model.data_times` shows it the official 1 - t, as in converted checkpoints); and there is no
unused second half of the output. docs/dit.md has the options of the official SDE sampler; by default the last step
here, from t = 1 / 250, returns the predicted x_0, and `auto` noise is w = b as in the paper, half of the official.

The paper reports FID-50K without guidance at 400,000 steps of 57.6 (S/2), 33.0 (B/2), 18.8 (L/2) and 17.2 (XL/2),
against 68.4, 43.5, 23.3 and 19.5 for DiT. Hardware, time and FID: not measured here.
"""

from sora_jax.config import check, choose, to_config_dict
from sora_jax.models.transformer import SIZES
from sora_jax.train.denoiser import DenoiserRun

# Of 256 pixels; the docstring names further words.
VARIANTS = ("XL/2", "S/2", "S/4", "S/8", "B/2", "B/4", "B/8", "L/2", "L/4", "L/8", "XL/4", "XL/8")

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
    model.depth = depth
    model.width = width
    model.heads = heads
    model.patch = (1, patch, patch)
    model.latent_channels = 4
    model.text = None
    model.classes = 1000
    model.rotary = False
    model.qk_norm = False
    model.sincos_positions = True
    model.sincos_axes = "xy"
    model.joint_qkv_init = True

    config.packing.length = (side // patch) ** 2
    config.packing.slots = 1

    diffusion = config.diffusion
    diffusion.process = process
    diffusion.prediction = "velocity"
    diffusion.caption_dropout = 0.1
    diffusion.times.distribution = "uniform"
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

    config.sampling.solver.name = "heun"
    config.sampling.steps = "125"
    config.sampling.guidance.scale = 4.0
    config.sampling.guidance.channels = 3  # of 4, as the official code does
    return config
