"""Text to video of pixel-art characters: 3,360 captioned clips of 64 x 64, on two CPU cores in under an hour.

    sora-jax data build --source=folder --path=lpc_sprites --strip-frames=8 --length-rule=pad --max-frames=9 \\
        --multiple=16 --out=data/sprites
    sora-jax train --config=configs/sprites.py:autoencoder --workdir=runs/sprites_autoencoder --config.data=data/sprites
    sora-jax data encode --autoencoder=runs/sprites_autoencoder --data=data/sprites --out=data/sprites_latents
    sora-jax train --config=configs/sprites.py:transformer --workdir=runs/sprites \\
        --config.latents=data/sprites_latents
    python experiments/sprites/make_sheet.py --workdir=runs/sprites --data=data/sprites --out=sprites.png --guidance=2

`lpc_sprites` holds the clips as strips of 8 frames in a zip, and captions.csv with the splits "train" and "test"
(experiments/sprites/README.md). The ninth frame, 1 + 4 k, repeats the eighth. Whatever is not of the split "train"
is held out: it is never trained on, by either part, and is what the PSNR and the sheet are of.

autoencoder: 4 x 8 x 8, 16 channels: a clip is 3 x 8 x 8 positions. Flat art on a plain ground needs few filters but
sharp edges, so 4 x 4 x 4 pixels are folded into channels at once and convolutions are split into space and time.
transformer (also the default): patches of 1 x 2 x 2, so 48 tokens a clip, two clips a pack.
Takes about 7 and 34 minutes on two cores; held-out PSNR 19.3 dB; pictures: experiments/sprites/README.md.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.train.autoencoder import AutoencoderRun
from sora_jax.train.denoiser import DenoiserRun

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
    config.crop, config.batch, config.image_share = (9, 32, 32), 8, 0.0
    model = config.model
    model.time_factor, model.space_factor, model.latent_channels = 4, 8, 16
    model.patch, model.width, model.multipliers = (4, 4), 96, (1, 2)
    model.kernels = ((1, 3, 3), (3, 1, 1))
    model.encoder_blocks, model.decoder_blocks = 2, 2
    optim = config.optim
    model.l2_weight, model.kl_weight = 4.0, 1e-3
    optim.learning_rate, optim.schedule, optim.warmup_steps = 4e-3, "cosine", 100
    optim.b2, optim.ema = 0.95, (0.999,)
    config.loop.steps = 2400
    config.loop.save_every, config.loop.preview_every = 600, 600
    return config


def transformer():
    config = to_config_dict(DenoiserRun())
    config.batch = 16
    model = config.model
    model.depth, model.width, model.heads, model.latent_channels = 6, 192, 6, 16
    model.patch, model.sincos_positions, model.position_theta = (1, 2, 2), True, 10.0
    model.remat, model.unroll = "none", 6
    model.text.vocabulary, model.text.width, model.text.depth = 256, 128, 1
    config.tokenizer.vocab, config.tokenizer.max_tokens = 256, 44
    packing = config.packing
    packing.length, packing.slots, packing.text_length = 96, 2, 88
    config.diffusion.times.base_tokens = 12
    optim = config.optim
    optim.learning_rate, optim.schedule, optim.warmup_steps = 2e-3, "cosine", 100
    optim.b2, optim.ema = 0.95, (0.995,)
    config.loop.steps = 2500
    config.loop.save_every, config.loop.preview_every = 250, 500
    config.preview.prompts, config.preview.sizes = PREVIEW, ((9, 64, 64),)
    config.preview.steps, config.sampling.guidance.scale = "15", 3.0
    return config
