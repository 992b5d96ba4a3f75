"""Train text to video on a small form of the full world, from scratch, on one CPU core in about three quarters of an
hour.

    sora-jax quickstart --config=configs/full_world.py --workdir=runs/full_world
    sora-jax evaluate runs/full_world/transformer --data=runs/full_world/world --count=64

The world has all motions, cameras and backgrounds of `--world=full`, and shapes that pass in front of others. It is
small where time would otherwise be spent on size: clips of 9 frames of 36 x 48 pixels, at most two shapes, none of them
small. The oracle reads the world's own clips of this size without error in colour, kind, motion, count, background and
camera.

The settings are those of configs/quickstart.py, with a token of 12 x 12 pixels of 2 frames: a clip has 60 tokens. What
differs: a longer training of the autoencoder, and no training on given frames. Time: 9 minutes for the autoencoder, 32
for the transformer, which is too little: colours come out right, kinds and motions seldom. Results:
experiments/consistency/README.md.
"""

from sora_jax.config import choose, load
from sora_jax.quickstart import default_config

VARIANTS = ("", "tiny")

PROMPTS = (
    ("a red circle moves right in front of a blue square on a plain white background", (9, 36, 48)),
    ("a yellow ring moves up in front of a purple cross on a plain black background", (9, 48, 36)),
    ("a green triangle moves left on a textured grey background while the camera pans right", (9, 36, 48)),
    ("an orange square spins clockwise on a plain slate background", (9, 48, 36)),
    ("a cyan ring orbits counterclockwise on a gradient sand background", (9, 36, 48)),
    ("a pink cross bounces left and right on a plain white background", (9, 36, 48)),
    ("a blue circle grows on a textured white background", (9, 48, 36)),
    ("a red square stays still on a textured black background while the camera zooms in", (9, 36, 48)),
)


def get_config(variant: str = ""):
    choose("variant of configs/full_world.py", variant, {"": 0, "tiny": 0})
    config = load(f"{default_config()}:{variant}" if variant else default_config())
    world(config, small=variant == "tiny")
    transformer(config.transformer)
    if not variant:
        steps(config)
    for place in (config.show, config.transformer.preview):
        place.prompts = tuple(prompt for prompt, _ in PROMPTS)
        place.sizes = tuple(size for _, size in PROMPTS)
    return config


def world(config, small):
    config.workers = 1
    if not small:
        config.clips = 5000
        config.holdout = 0.15
        config.evaluate = 32

    world = config.world
    world.sizes = ((36, 48), (48, 36))
    world.frames = (9,)
    world.image_share = 0.1
    world.max_shapes = 2
    world.scale = (0.34, 0.48)
    world.backgrounds = ("plain", "gradient", "textured")
    world.shapes = ("circle", "square", "triangle", "cross", "ring")
    # A word that stands there twice is twice as frequent; a pass needs two shapes, so that 23 % of the clips show one.
    world.motions = (
        "move", "move", "still", "bounce", "orbit", "rotate", "grow", "shrink", "pass", "pass", "pass"
    )  # fmt: skip
    world.cameras = (
        "still", "still", "still", "still", "still", "still",
        "pan left", "pan right", "pan up", "pan down", "zoom in", "zoom out",
    )  # fmt: skip
    world.extra_captions = ()


def transformer(config):
    config.captions = "first"
    config.model.text.vocabulary = 192
    config.tokenizer.vocab = 192
    config.tokenizer.max_tokens = 40

    packing = config.packing
    packing.length = 120
    packing.slots = 4
    packing.text_length = 120
    packing.rows_per_clip = 1

    config.diffusion.times.base_tokens = 8
    for name in ("first", "last", "ends", "frames", "boxes", "levels", "headless"):
        config.diffusion.given[name] = 0.0


def steps(config):
    """Set the number of steps, and the packs of a batch, which are longer than the quickstart's."""
    for stage, count in zip(config.autoencoder.stages, (4500, 1500), strict=True):
        stage.steps = count
    config.transformer.batch = 8
    for loop, count, previews in ((config.autoencoder.loop, 4500, 3), (config.transformer.loop, 1750, 2)):
        loop.log_every = count // 50
        loop.save_every = -(-count // previews)
        loop.preview_every = loop.save_every
    config.transformer.loop.steps = 1750
