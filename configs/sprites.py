"""Train text to video of pixel-art characters: 3,360 captioned clips of 64 x 64, on two CPU cores in some two hours.

    sora-jax data build --source=folder --path=lpc_sprites --strip-frames=8 --length-rule=pad --max-frames=9 \\
        --multiple=16 --out=data/sprites
    sora-jax train --config=configs/sprites.py:autoencoder --workdir=runs/sprites_autoencoder --config.data=data/sprites
    sora-jax data encode --autoencoder=runs/sprites_autoencoder --data=data/sprites --out=data/sprites_latents
    sora-jax train --config=configs/sprites.py:transformer --workdir=runs/sprites \\
        --config.latents=data/sprites_latents
    python experiments/sprites/make_sheet.py --workdir=runs/sprites --data=data/sprites --out=sprites.png --guidance=2

`lpc_sprites` holds the clips as strips of 8 frames in a zip, and captions.csv with the splits "train" and "test"
(experiments/sprites/README.md). The ninth frame repeats the eighth, because a clip has 1 + 2 k frames. Neither model
trains on clips outside the split "train"; PSNR and sheet are computed on those held-out clips.

autoencoder: 2 x 4 x 4, 8 channels: a clip has 5 x 16 x 16 latent positions. Flat art on a plain background needs few
filters but sharp edges, so a space-to-depth of 2 x 2 x 2 pixels comes first and convolutions are factored into space
and time. transformer (default): patches of 1 x 4 x 4, so 80 tokens a clip, two clips per pack; a third of the clips are
trained with given frames, for the tasks. Time: 40 and some 50 minutes of processor time on one core each. Held-out
PSNR: 27.6 dB. Samples and measures: experiments/sprites/README.md. The model `sprites` of the package is this one.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.train.autoencoder import AutoencoderRun
from sora_jax.train.denoiser import DenoiserRun

VARIANTS = ("transformer", "autoencoder")

PREVIEW = (
    "a pixel-art character with light skin, spiky green hair, chain mail, white trousers and golden shoes, walking,"
    " facing to the right",
    "a pixel-art character with pale blue skin, white hair, a white shirt, red trousers and steel boots, walking,"
    " facing away from the camera",
    "a pixel-art character with light skin, white hair, chain mail, red trousers and brown shoes, slashing,"
    " facing to the right",
    "a pixel-art character with light skin, spiky green hair, a white shirt, white trousers and steel boots,"
    " casting a spell, facing away from the camera",
)


def get_config(variant: str = "transformer"):
    variants = {"transformer": transformer, "autoencoder": autoencoder}
    return choose("variant of configs/sprites.py", variant or "transformer", variants)()


def autoencoder():
    config = to_config_dict(AutoencoderRun())
    config.crop = (9, 32, 32)
    config.batch = 8
    config.image_share = 0.0

    model = config.model
    model.time_factor = 2
    model.space_factor = 4
    model.latent_channels = 8
    model.patch = (2, 2)
    model.width = 64
    model.multipliers = (1, 2)
    model.kernels = ((1, 3, 3), (3, 1, 1))
    model.encoder_blocks = 2
    model.decoder_blocks = 3
    model.linear = True  # the linear paths start as the data's principal components
    model.l1_weight = 0.25
    model.l2_weight = 8.0
    model.kl_weight = 1e-4

    optim = config.optim
    optim.method = "muon"
    optim.learning_rate = 4e-3
    optim.schedule = "cosine"
    optim.warmup_steps = 100
    optim.b2 = 0.95
    optim.ema = (0.999,)

    config.loop.steps = 3000
    config.loop.save_every = 500
    config.loop.preview_every = 1500
    return config


def transformer():
    config = to_config_dict(DenoiserRun())
    config.batch = 16

    model = config.model
    model.depth = 5
    model.width = 160
    model.heads = 5
    model.latent_channels = 8
    model.patch = (1, 4, 4)
    model.input_skip = True
    model.sincos_positions = True
    model.position_theta = 10.0
    model.remat = "none"
    model.unroll = 5

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

    config.preview.prompts = PREVIEW
    config.preview.sizes = ((9, 64, 64),)
    config.preview.steps = "15"

    config.sampling.guidance.scale = 3.0
    return config
