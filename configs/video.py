"""Train text to video on real videos and images at their own aspect ratios: a small form, and a large one.

The small form takes about an hour on one or two CPU cores in all; an accelerator was not measured:

    sora-jax data build --config=configs/video.py:small_data --path=clips --out=data/small
    sora-jax data inspect data/small --out=look
    sora-jax train --config=configs/video.py:small_autoencoder --workdir=runs/small_autoencoder --config.data=data/small
    sora-jax data encode --autoencoder=runs/small_autoencoder --data=data/small --out=data/small_latents
    sora-jax train --config=configs/video.py:small --workdir=runs/small --config.latents=data/small_latents
    sora-jax sample --workdir=runs/small --prompt="a fox runs" --frames=9 --height=64 --width=64 --out=fox.mp4

The large form takes some 14 hours on two CPU cores; it is meant for an accelerator:

    sora-jax data build --config=configs/video.py:data --path=clips --out=data/video
    sora-jax train --config=configs/video.py:autoencoder --workdir=runs/video_autoencoder --config.data=data/video
    sora-jax data encode --autoencoder=runs/video_autoencoder --data=data/video --out=data/video_latents
    sora-jax train --config=configs/video.py:transformer --workdir=runs/video --config.latents=data/video_latents
    sora-jax sample --workdir=runs/video --prompt="a fox runs" --frames=17 --height=96 --width=144 --out=fox.mp4

`clips` is any folder of videos and images, each with its caption in a text file of the same name or in a table such as
`captions.csv`. Every clip keeps its aspect ratio: 720 x 480 becomes 80 x 48 (small) or 144 x 96.

|                | small_data, small_autoencoder, small           | data, autoencoder, transformer (default)         |
|----------------|------------------------------------------------|--------------------------------------------------|
| clips          | 1, 5 or 9 frames, at most 8 a second, 64 x 64  | 1 to 17 frames in steps of 4, 128 x 128 pixels   |
| autoencoder    | 4 x 8 x 8, 16 channels, width 64               | 4 x 8 x 8, 16 channels, width 96                 |
| transformer    | depth 6, width 192; at most 48 tokens a clip   | depth 8, width 256; at most 320 tokens a clip    |

The configs of the data take their sizes from the two models, so that every clip fits both. For more pixels raise
`--max-pixels`, `--max-tokens` and `--config.packing.length`. docs/own_video.md has each step with its time and picture;
experiments/video/README.md has reconstructions.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.data.building.prepare import BuildConfig
from sora_jax.data.sources import SourceConfig
from sora_jax.train.autoencoder import AutoencoderRun
from sora_jax.train.denoiser import DenoiserRun

VARIANTS = ("transformer", "autoencoder", "data", "small", "small_autoencoder", "small_data")


def get_config(variant: str = "transformer"):
    variants = {
        "data": data,
        "autoencoder": autoencoder,
        "transformer": transformer,
        "small_data": small_data,
        "small_autoencoder": small_autoencoder,
        "small": small,
    }
    return choose("variant of configs/video.py", variant or "transformer", variants)()


def data():
    config = _sizes(autoencoder(), transformer(), max_frames=17)
    config.train_config = "configs/video.py:transformer"
    config.max_pixels = 128 * 128
    return config


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

    config.preview.clips = 8  # their captions and sizes
    config.preview.sizes = ((17, 96, 144),)  # what `sample` makes when it is asked for no size
    config.preview.steps = "20"

    config.sampling.guidance.scale = 3.0
    return config


def small_data():
    config = _sizes(small_autoencoder(), small(), max_frames=9)
    config.train_config = "configs/video.py:small"
    config.max_pixels = 64 * 64
    config.max_fps = 8.0  # so that nine frames last a second
    config.clips_per_file = 4  # four seconds of a long video are four clips
    return config


def small_autoencoder():
    config = autoencoder()
    config.crop = (9, 32, 32)
    config.batch = 8
    config.model.width = 64
    config.loop.steps = 2500
    config.loop.save_every = 250
    config.loop.preview_every = 500
    return config


def small():
    config = transformer()

    model = config.model
    model.depth = 6
    model.width = 192
    model.heads = 6
    model.position_theta = 10.0
    model.remat = "none"
    model.unroll = 6

    model.text.depth = 1
    config.tokenizer.max_tokens = 32

    packing = config.packing
    packing.length = 192
    packing.slots = 24
    packing.text_length = 256

    config.diffusion.times.base_tokens = 12

    optim = config.optim
    optim.learning_rate = 2e-3
    optim.warmup_steps = 100
    optim.b2 = 0.95
    optim.ema = (0.995,)

    config.loop.steps = 1500
    config.loop.save_every = 250
    config.loop.preview_every = 300

    config.preview.sizes = ((9, 64, 64),)
    return config


def _sizes(autoencoder, transformer, max_frames: int):
    """Return the config of a dataset whose clips fit both models."""
    config = BuildConfig(
        sources=(SourceConfig("folder", "clips"),),
        max_frames=max_frames,
        time_factor=autoencoder.model.time_factor * transformer.model.patch[0],
        multiple=autoencoder.model.space_factor * transformer.model.patch[1],
        max_tokens=transformer.packing.length,
        workers=2,
    )
    return to_config_dict(config)
