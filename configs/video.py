"""Real video and pictures together, at their own aspect ratios, on a laptop or one accelerator.

    sora-jax data build --source=folder --path=clips --out=data/video --max-frames=17 --multiple=16 --max-pixels=16384
    sora-jax train --config=configs/video.py:autoencoder --workdir=runs/video_autoencoder --config.data=data/video
    sora-jax data encode --autoencoder=runs/video_autoencoder --data=data/video --out=data/video_latents
    sora-jax train --config=configs/video.py:transformer --workdir=runs/video --config.latents=data/video_latents
    sora-jax sample --workdir=runs/video --prompt="a photo of a sunflower" --frames=1 --height=96 --width=144 \\
        --out=sunflower.png

`clips` is any folder of videos and pictures, each with its caption in a text file of the same name or in a
`captions.csv`. Every clip keeps its aspect ratio: 720 x 480 becomes 144 x 96, a portrait of 720 x 1280 becomes
96 x 160. A clip has at most 17 frames, 1 + 4 k of them; one that is shorter is cut to the next such length.

autoencoder: 4 x 8 x 8, 16 channels, width 32. transformer (also the default): depth 8, width 256, patches of 1 x 2 x 2,
so at most 5 x 64 = 320 tokens a clip, in packs of 512. Meant for two to eight CPU cores for an evening, or one
accelerator for minutes; more pixels with `--max-pixels` and `--config.packing.length`. Times and PSNR: not measured
at this size; experiments/video/README.md has a smaller run on example clips.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.train.autoencoder import AutoencoderRun
from sora_jax.train.denoiser import DenoiserRun

PREVIEW = (
    ("a photo of a sunflower", (1, 96, 144)),
    ("a photo of a daisy", (1, 112, 112)),
    ("a rabbit is eating a watermelon", (17, 112, 112)),
    ("a green toy frog on a wooden table, the camera moves closer", (17, 96, 144)),
)


def get_config(variant: str = "transformer"):
    variants = {"transformer": transformer, "autoencoder": autoencoder}
    return choose("variant of configs/video.py", variant or "transformer", variants)()


def autoencoder():
    config = to_config_dict(AutoencoderRun())
    config.crop, config.batch, config.image_share = (17, 64, 64), 8, 0.25
    model = config.model
    model.time_factor, model.space_factor, model.latent_channels = 4, 8, 16
    model.patch, model.width, model.multipliers = (1, 2), 32, (1, 2, 4)
    model.encoder_blocks, model.decoder_blocks = 1, 2
    optim = config.optim
    optim.learning_rate, optim.schedule, optim.warmup_steps, optim.ema = 1e-3, "cosine", 100, (0.995,)
    config.loop.steps = 4000
    config.loop.save_every, config.loop.preview_every = 500, 500
    return config


def transformer():
    config = to_config_dict(DenoiserRun())
    config.batch = 8
    model = config.model
    model.depth, model.width, model.heads, model.latent_channels = 8, 256, 8, 16
    model.patch, model.sincos_positions, model.position_theta = (1, 2, 2), True, 100.0
    model.text.vocabulary, model.text.width, model.text.depth = 1024, 128, 2
    config.tokenizer.vocab, config.tokenizer.max_tokens = 1024, 48
    packing = config.packing
    packing.length, packing.slots, packing.text_length = 512, 16, 192
    config.diffusion.times.base_tokens = 64
    optim = config.optim
    optim.learning_rate, optim.schedule, optim.warmup_steps, optim.ema = 5e-4, "cosine", 200, (0.999,)
    config.loop.steps = 10_000
    config.loop.save_every, config.loop.preview_every = 500, 1000
    config.preview.prompts = tuple(prompt for prompt, _ in PREVIEW)
    config.preview.sizes = tuple(size for _, size in PREVIEW)
    config.preview.steps, config.sampling.guidance.scale = "20", 3.0
    return config
