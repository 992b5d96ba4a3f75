"""Train text to video on hardware from a laptop to a pod: one family of transformers over packs of clips of any size.

    sora-jax plan --config=configs/sora.py:3b --topology=v5p:4x4x8
    sora-jax train --config=configs/sora.py:3b --workdir=runs/3b --config.latents=data/latents

Each variant names the hardware it is meant for and its pack length there; experiments/plans holds the output of `plan`
for each. Time and quality: not measured; nothing here has been trained on a TPU.

    variant           parameters  depth  width  heads  text       meant for              mesh             pack length
    configs/sora.py:tiny  0.26 M      2     64      2  learnt     one core, v5e:2x2      data                     256
    configs/sora.py:s       51 M     12    384      6  learnt     v5e:4x4 (16 chips)     data x fsdp=8           8192
    configs/sora.py:b      164 M     12    768     12  learnt     v5e:4x4 (16 chips)     data x fsdp=8           8192
    configs/sora.py:l      585 M     24   1024     16  umt5-base  v5e:4x4 (16 chips)     fsdp=16                 8192
    configs/sora.py:xl     841 M     28   1152     16  umt5-base  v6e:16x16 (256 chips)  data=8 x fsdp=32       16384
    configs/sora.py:3b     3.0 B     34   2048     16  umt5-xxl   v5p:4x4x4 (64 chips)   fsdp                   32768
    configs/sora.py:14b   14.0 B     40   4096     32  umt5-xxl   v5p:4x8x8, or          fsdp                   32768
                                                                  v5p:4x4x8 in 2 slices

Google's price list calls v5p:4x4x4 v5p-128: it counts cores, two per chip. A pack of 32768 tokens holds a clip of 81
frames at 480 x 832 (21 x 30 x 52 tokens, with an autoencoder of 4 x 8 x 8 and patches of 1 x 2 x 2), or a mix of
shorter clips and images. Latents have 16 channels, such as those of `configs/autoencoder.py:base`. For l and larger,
embed the captions once with `sora-jax data encode --text-encoder=google/umt5-xxl --text-tokens=256`.

On accelerators all variants compute in bfloat16 (parameters, optimizer state and EMA stay float32) and recompute
everything but attention in the backward pass. `batch` is the global number of packs, a multiple of slice x data x fsdp.
On more chips, raise it, or lower `mesh.fsdp` for small variants. For longer clips, set `--config.packing.length` and
`--config.mesh.sequence=4`.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.train.denoiser import DenoiserRun

VARIANTS = ("b", "tiny", "s", "l", "xl", "3b", "14b")

ENCODERS = {"umt5-base": ("google/umt5-base", 768), "umt5-xxl": ("google/umt5-xxl", 4096)}
SIZES = {  # depth, width, heads; text encoder, width of the text; pack length, packs, fsdp
    "tiny": (2, 64, 2, None, 32, 256, 8, 1),
    "s": (12, 384, 6, None, 512, 8192, 32, 8),
    "b": (12, 768, 12, None, 512, 8192, 32, 8),
    "l": (24, 1024, 16, "umt5-base", 1024, 8192, 16, 16),
    "xl": (28, 1152, 16, "umt5-base", 1024, 16_384, 256, 32),
    "3b": (34, 2048, 16, "umt5-xxl", 1024, 32_768, 128, -1),
    "14b": (40, 4096, 32, "umt5-xxl", 1024, 32_768, 256, -1),
}


def get_config(variant: str = "b"):
    size = choose("variant of configs/sora.py", variant or "b", SIZES)
    depth, width, heads, encoder, text_width, length, packs, fsdp = size
    config = to_config_dict(DenoiserRun())
    config.batch = packs

    model = config.model
    model.depth = depth
    model.width = width
    model.heads = heads
    model.patch = (1, 2, 2)
    model.latent_channels = 16
    model.remat = "attention"

    text(config, encoder, text_width)

    packing = config.packing
    packing.length = length
    packing.slots = max(8, length // 1024)
    packing.text_length = 64 * packing.slots

    config.mesh.fsdp = fsdp
    config.mesh.data = 1 if fsdp == -1 else -1

    optim = config.optim
    optim.learning_rate = 1e-4
    optim.warmup_steps = 1000
    optim.b2 = 0.95
    optim.weight_decay = 0.01
    optim.ema = (0.9999,)

    loop = config.loop
    loop.steps = 200_000
    loop.log_every = 50
    loop.save_every = 1000

    if variant == "tiny":
        optim.learning_rate = 1e-3
        optim.warmup_steps = 10
        optim.ema = (0.99,)
        loop.steps = 200
        loop.log_every = 10
        loop.save_every = 100
    return config


def text(config, encoder: str | None, width: int) -> None:
    """Set the text encoder: two blocks over a pretrained encoder, or over word embeddings learnt with the model."""
    model = config.model.text
    model.width = width
    model.depth = 2
    model.head_width = 16 if width < 64 else 64
    if encoder:
        model.pretrained, model.pretrained_width = ENCODERS[encoder]
        config.tokenizer.max_tokens = 256
    else:
        config.tokenizer.vocab = 512 if width < 64 else 8192
        config.tokenizer.max_tokens = 64 if width < 64 else 128
        model.vocabulary = config.tokenizer.vocab
