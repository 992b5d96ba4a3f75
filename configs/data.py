"""Where clips come from, for `sora-jax data build`: lists of sources, with weights.

    sora-jax data build --config=configs/data.py:video --config.sources[0].path=clips --out=data/video
    sora-jax data build --config=configs/data.py:mixed --out=data/mixed \\
        --config.sources[0].path=clips --config.sources[1].path='shards/*.tar' --config.sources[2].path=photographs
    sora-jax data build --config=configs/data.py:navit --config.sources[0].path=photographs --out=data/navit
    sora-jax data build --config=configs/data.py:labels --out=data/flowers

video: one folder, every clip at its own aspect ratio, at most 320 tokens (of 4 frames and 16 x 16 pixels), at 12
frames a second; of a long file up to eight clips. mixed: videos in a folder, videos in WebDataset shards, and
photographs, of which an epoch sees half. navit: each picture in four sizes, drawn as NaViT draws them, which epochs
take in turn. labels: a TFDS data set with class labels, each kept as a number and as a caption. Any option of
`sora_jax/data/prepare.py` can be changed with `--config.NAME=VALUE`, or by its flag. Runs on a laptop; `--workers`
decode in parallel, `--shard=i/n` shares the work between machines. Times: experiments/bench/README.md.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.data.prepare import BuildConfig
from sora_jax.data.sources import SourceConfig


def get_config(variant: str = "video"):
    variants = {"video": video, "mixed": mixed, "navit": navit, "labels": labels}
    return choose("variant of configs/data.py", variant or "video", variants)()


def video():
    return to_config_dict(
        BuildConfig(sources=(SourceConfig("folder", "clips"),), max_tokens=320, fps=12.0, clips_per_file=8, workers=2)
    )


def mixed():
    sources = (
        SourceConfig("folder", "clips"),
        SourceConfig("webdataset", "shards/*.tar"),
        SourceConfig("folder", "photographs", weight=0.5),
    )
    return to_config_dict(BuildConfig(sources=sources, max_tokens=320, max_fps=12.0, workers=2))


def navit():
    sources = (SourceConfig("folder", "photographs"),)
    sizes = dict(resolution="navit", min_pixels=64 * 64, max_pixels=256 * 256, variants=4)
    return to_config_dict(BuildConfig(sources=sources, max_frames=1, workers=2, **sizes))


def labels():
    source = SourceConfig("tfds:oxford_flowers102", label="both", label_caption="a photo of a {label}")
    return to_config_dict(BuildConfig(sources=(source,), max_frames=1, max_pixels=64 * 64, workers=2))
