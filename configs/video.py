"""Train text to video on real videos and images at their own aspect ratios, on a laptop or one accelerator.

    sora-jax data build --source=folder --path=clips --out=data/video --max-frames=17 --multiple=16 --max-pixels=16384
    sora-jax train --config=configs/video.py:autoencoder --workdir=runs/video_autoencoder --config.data=data/video
    sora-jax data encode --autoencoder=runs/video_autoencoder --data=data/video --out=data/video_latents
    sora-jax train --config=configs/video.py:transformer --workdir=runs/video --config.latents=data/video_latents
    sora-jax sample --workdir=runs/video --prompt="a photo of a sunflower" --frames=1 --height=96 --width=144 \\
        --out=sunflower.png

`clips` is any folder of videos and images, each with its caption in a text file of the same name or in a
`captions.csv`. Every clip keeps its aspect ratio: 720 x 480 becomes 144 x 96, a portrait of 720 x 1280 becomes
96 x 160. A clip has 1 + 4 k frames, at most 17; other lengths are cut to the next shorter one.

autoencoder: 4 x 8 x 8, 16 channels, width 96, a linear start. transformer (default): depth 8, width 256, patches of
1 x 2 x 2, so at most 5 x 64 = 320 tokens a clip, in packs of 512. Hardware: two to eight CPU cores for an evening, or
one accelerator for minutes; for more pixels raise `--max-pixels` and `--config.packing.length`. Time and PSNR: not
measured at this size; experiments/video/README.md has a smaller run on example clips.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.train.autoencoder import AutoencoderRun
from sora_jax.train.denoiser import DenoiserRun

VARIANTS = ("transformer", "autoencoder")

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
    config.crop = (9, 64, 64)
    config.batch = 4
    config.image_share = 0.25

    model = config.model
    model.time_factor = 4
    model.space_factor = 8
    model.latent_channels = 16
    model.patch = (4, 4)
    model.width = 96
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

    config.loop.steps = 4000
    config.loop.save_every = 500
    config.loop.preview_every = 1000
    return config


def transformer():
    config = to_config_dict(DenoiserRun())
    config.batch = 8

    model = config.model
    model.depth = 8
    model.width = 256
    model.heads = 8
    model.latent_channels = 16
    model.patch = (1, 2, 2)
    model.input_skip = True
    model.sincos_positions = True
    model.position_theta = 100.0

    model.text.vocabulary = 1024
    model.text.width = 128
    model.text.depth = 2
    config.tokenizer.vocab = 1024
    config.tokenizer.max_tokens = 48

    packing = config.packing
    packing.length = 512
    packing.slots = 16
    packing.text_length = 192

    config.diffusion.times.base_tokens = 64

    optim = config.optim
    optim.learning_rate = 5e-4
    optim.schedule = "cosine"
    optim.warmup_steps = 200
    optim.ema = (0.999,)

    config.loop.steps = 10_000
    config.loop.save_every = 500
    config.loop.preview_every = 1000

    config.preview.prompts = tuple(prompt for prompt, _ in PREVIEW)
    config.preview.sizes = tuple(size for _, size in PREVIEW)
    config.preview.steps = "20"

    config.sampling.guidance.scale = 3.0
    return config
