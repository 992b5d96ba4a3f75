"""Build datasets from several sources with `sora-jax data build`: a list of sources, each with a weight.

    sora-jax data build --config=configs/data.py:video --config.sources[0].path=clips --out=data/video
    sora-jax data build --config=configs/data.py:mixed --out=data/mixed \\
        --config.sources[0].path=clips --config.sources[1].path='shards/*.tar' --config.sources[2].path=photographs
    sora-jax data build --config=configs/data.py:navit --config.sources[0].path=photographs --out=data/navit
    sora-jax data build --config=configs/data.py:labels --out=data/flowers

video: one folder; every clip keeps its aspect ratio, has at most 320 tokens (of 4 frames and 16 x 16 pixels) and 12
frames a second; a long file gives up to eight clips. mixed: videos in a folder, videos in WebDataset shards, and
photographs, of which an epoch sees half. navit: each picture in four sizes, sampled as in NaViT; epochs take them in
turn. labels: a TFDS data set with class labels, each kept as a number and as a caption. It has one feature of pictures
and one of classes, so they need no names (`media_field`, `label_field`).

`--config.NAME=VALUE`, or the option of that name, overrides any field of
`sora_jax/data/building/prepare.py:BuildConfig`.
Hardware: a laptop; `--workers` sets the number of decoding processes, `--shard=i/n` divides the work between machines.
Times: experiments/bench/README.md.
"""

from sora_jax.config import choose, to_config_dict
from sora_jax.data.building.prepare import BuildConfig
from sora_jax.data.sources import SourceConfig

VARIANTS = ("video", "mixed", "navit", "labels")


def get_config(variant: str = "video"):
    variants = {"video": video, "mixed": mixed, "navit": navit, "labels": labels}
    return choose("variant of configs/data.py", variant or "video", variants)()


def video():
    config = BuildConfig(
        sources=(SourceConfig("folder", "clips"),),
        max_tokens=320,
        fps=12.0,
        clips_per_file=8,
        workers=2,
    )
    return to_config_dict(config)


def mixed():
    sources = (
        SourceConfig("folder", "clips"),
        SourceConfig("webdataset", "shards/*.tar"),
        SourceConfig("folder", "photographs", weight=0.5),
    )
    config = BuildConfig(
        sources=sources,
        max_tokens=320,
        max_fps=12.0,
        workers=2,
    )
    return to_config_dict(config)


def navit():
    config = BuildConfig(
        sources=(SourceConfig("folder", "photographs"),),
        max_frames=1,
        resolution="navit",
        min_pixels=64 * 64,
        max_pixels=256 * 256,
        variants=4,
        workers=2,
    )
    return to_config_dict(config)


def labels():
    source = SourceConfig("tfds:oxford_flowers102", label="both", label_caption="a photo of a {label}")
    config = BuildConfig(
        sources=(source,),
        max_frames=1,
        max_pixels=64 * 64,
        workers=2,
    )
    return to_config_dict(config)
