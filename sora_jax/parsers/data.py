"""Parse and run the verbs of `sora-jax data`."""

import argparse
import functools

from sora_jax import console
from sora_jax.files import as_path
from sora_jax.parsers.base import CONFIG, EXAMPLES, Help, add_json, add_tiles, make_parser
from sora_jax.parsers.fields import list_fields


class _BuildHelp(Help):
    """Show the defaults of the configs that `data build` fills."""

    def format_help(self):
        self.defaults = build_defaults()  # not before help is asked for: the import takes 0.3 seconds
        return super().format_help()


def add_data(commands) -> None:
    """Add the command `data` with its verbs."""
    p = make_parser(commands.add_parser, "data", help="build, encode and inspect datasets", epilog=EXAMPLES)
    verbs = p.add_subparsers(title="verbs", required=True, metavar="build|encode|inspect|caption")
    _build(verbs)
    _encode(verbs)
    example = "example:\n  sora-jax data inspect data/clips --out=look\n"
    example += "  sora-jax data inspect data/clips --config=configs/video.py:small"
    p = make_parser(verbs.add_parser, "inspect", help="summarise a dataset folder", epilog=example)
    p.add_argument("folder", type=as_path, help="dataset folder; it is only read")
    about = "config of a training, whose packs are counted (default: that which the config of the build names)"
    p.add_argument("--config", help=about)
    p.add_argument("--pack-length", type=int, help="tokens per pack for the packing statistics (default: two clips)")
    p.add_argument("--slots", type=int, help="clips per pack at most, as config.packing.slots (default: 16)")
    p.add_argument("--out", type=as_path, help="folder for contact_sheet.png and histogram.png (default: no pictures)")
    add_json(p)
    p.set_defaults(function=inspect)
    example = (
        "example:\n  sora-jax data caption --path=clips --how=transformers:Salesforce/blip-image-captioning-base"
        " --out=clips/captions.csv"
    )
    p = make_parser(verbs.add_parser, "caption", help="caption the clips of a folder by a model", epilog=example)
    p.add_argument("--path", type=as_path, required=True, help="folder of videos and images")
    p.add_argument("--how", required=True, help="world (its oracle) or transformers:MODEL (an image-to-text model)")
    p.add_argument("--kind", default="synthetic", help="kind of the captions; the column is caption_KIND")
    p.add_argument(
        "--out", type=as_path, required=True, help="table to write; as captions.csv in the folder it is used"
    )
    add_json(p)
    p.set_defaults(function=caption)


def _encode(verbs) -> None:
    example = (
        "example:\n  sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents\n"
        "  sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents --shard=0/4\n"
        "  sora-jax data encode --autoencoder=runs/autoencoder --data=data/clips --out=data/latents --tile=auto"
    )
    p = make_parser(verbs.add_parser, "encode", help="encode a dataset folder into a latent cache", epilog=example)
    p.add_argument("--autoencoder", type=as_path, required=True, help="run folder of a trained autoencoder")
    p.add_argument("--data", type=as_path, required=True, help="dataset folder")
    p.add_argument("--out", type=as_path, required=True, help="latent cache to write")
    p.add_argument("--batch", type=int, default=16, help="batch size, in clips (or tiles)")
    add_tiles(p)
    p.add_argument("--shapes", type=int, default=4, help="maximum number of padded shapes; each compiles a program")
    p.add_argument("--shard", default="0/1", help="i/n: encode every n-th part; the last process to finish merges them")
    p.add_argument("--text-encoder", help="embed captions with this T5, UMT5 or CLIP of transformers (name or folder)")
    p.add_argument("--text-tokens", type=int, default=128, help="maximum tokens of a caption, with --text-encoder")
    about = "of each clip, encoded alone, for models that are given some (config.diffusion.given)"
    p.add_argument("--key-frames", type=int, default=0, metavar="K", help=f"frames {about}")
    p.add_argument("--sketches", type=int, default=0, metavar="K", help=f"edge maps of frames {about}")
    about = "encode each clip at half its height and width, too, for models with model.low_resolution"
    p.add_argument("--low", action="store_true", help=about)
    add_json(p)
    p.set_defaults(function=encode)


# Option of `data build` -> field of SourceConfig
SOURCE_FLAGS = {"source": "name"} | {
    name: name
    for name in ("path", "limit", "split", "media_field", "caption_field", "label_field", "label", "label_caption")
    + ("strip_frames", "strip_fps")
}
WORLD = "simple"


def _build(verbs) -> None:
    example = (
        "example:\n  sora-jax data build --path=phone --out=data/phone --missing-caption=empty\n"
        "  sora-jax data build --config=configs/video.py:small_data --path=clips --out=data/small\n"
        "  sora-jax data build --path=clips --out=data/clips --max-frames=17 --multiple=16\n"
        "  sora-jax data build --source=webdataset --path='shards/*.tar' --out=data/clips --workers=8\n"
        "  sora-jax data build --source=world --limit=2000 --multiple=8 --out=data/world\n"
        "  sora-jax data build --config=configs/data.py:mixed --out=data/mixed      several sources"
    )
    about = "build a dataset folder from videos and images"
    p = make_parser(verbs.add_parser, "build", help=about, epilog=example, formatter_class=_BuildHelp)
    p.add_argument("--out", required=True, help="dataset folder to write")
    p.add_argument("--config", metavar="FILE[:VARIANT]", help=f"{CONFIG}; other options override it, too")
    # An option that is not given leaves the field of --config, or the default of the dataclass, as it is.
    add = functools.partial(p.add_argument, default=argparse.SUPPRESS)
    add("--source", help="folder, webdataset, tfds:NAME[:CONFIG], array_record or world")
    add("--path", help="folder, tar shards or dataset folder to read; data_dir of TFDS")
    add("--limit", type=int, help="maximum number of entries of the source, evenly spaced")
    add("--split", help="splits of TFDS, such as train or train[:10%%]+test (default: all)")
    add("--media-field", help="feature of TFDS with the video or picture; ending of the member of tar samples")
    captions = "column or key with the caption (default: caption, text or prompt); or feature of TFDS, which has none"
    add("--caption-field", help=captions)
    add("--label-field", help="feature of TFDS, column or key with the class (default: label)")
    add("--label", help="use of a class label: caption, class or both")
    add("--label-caption", help="caption of a class, with {label} for its name")
    add("--strip-frames", type=int, help="split each image into so many frames, from left to right")
    add("--strip-fps", type=float, help="frames per second of such strips")
    add("--world", help="world that is drawn: simple, full, phyworld[:parabola|:collision], moving_mnist[:stochastic]")
    add("--digits", metavar="PATH", help="images of digits for moving_mnist: folder with MNIST's files, or tfds:mnist")
    add("--max-frames", type=int, help="maximum length; clips are cut to 1 + time_factor * k frames")
    add("--time-factor", type=int, help="temporal compression of the autoencoder you will train")
    add("--length-rule", help="cut to the next shorter allowed length, or pad to the next longer")
    add("--min-frames", type=int, help="refuse clips that end shorter")
    add("--fps", type=float, help="resample all clips to this frame rate, by time stamps")
    add("--max-fps", type=float, help="drop frames of clips with a higher frame rate")
    add("--place", help="part to take of a longer clip: start, middle or random")
    add("--clips-per-file", type=int, help="clips to take of a file that is long enough")
    add("--cuts", action="store_true", help="shorten clips to their longest part without a scene cut")
    add("--multiple", type=int, help="height and width become multiples of this")
    add("--max-pixels", type=int, help="maximum height x width; the aspect ratio is kept")
    add("--max-tokens", type=int, help="maximum tokens; one is time_factor frames of multiple x multiple pixels")
    add("--resolution", help="largest that is allowed, or sampled: uniform or navit")
    add("--min-pixels", type=int, help="minimum height x width when sampled (default: (4 * multiple)^2)")
    add("--framing", help="native aspect ratio, or square crops: native or square")
    add("--variants", type=int, help="sizes or places of each clip; epochs take them in turn")
    add("--mirror", action="store_true", help="add the mirror image of each clip; epochs take the two in turn")
    add("--missing-caption", help="refuse clips without a caption, or use an empty one: refuse or empty")
    add("--holdout", type=float, help="fraction of clips held out; one of five files or more at least")
    add("--seed", type=int, help="seed of the held-out split, places and sizes")
    add("--workers", type=int, help="decoding processes; 0: decode in this one, unprotected from crashes")
    add("--seconds", type=float, help="refuse a file that takes longer to decode")
    add("--shard", help="i/n: build every n-th part of 128 files; the last process to finish merges them")
    p.add_argument("--beam", help="build with Apache Beam; its pipeline options, such as --beam=--runner=DirectRunner")
    add_json(p)
    list_fields(p)
    p.set_defaults(function=build, changes=[])


def build_defaults() -> dict:
    """Return the default of each option of `data build`: that of the config field which it sets."""
    from sora_jax.data.building.prepare import BuildConfig
    from sora_jax.data.sources import SourceConfig

    source = {flag: getattr(SourceConfig, field) for flag, field in SOURCE_FLAGS.items()}
    return vars(BuildConfig) | source | {"world": WORLD}


def build(options) -> None:
    """Build a dataset folder and print its summary."""
    from sora_jax.data.building.build import build, tally
    from sora_jax.data.building.inspect import inspect

    config = build_config(options)
    if options.beam is None:
        dataset = build(config)
    else:
        from sora_jax.data.building.beam import build_with_beam

        dataset = build_with_beam(config, options.beam)
    if dataset is None:
        _share_is_done(options.out)
        return
    found = inspect(options.out, training=training_of(dataset.info))
    reasons = dataset.path / "refused.jsonl"
    text = f"{found.text}\n{options.out}: {len(dataset)} clips, {found.summary['images']} of them images"
    if dataset.refused:
        kinds = tally(entry["reason"] for entry in dataset.refused)
        text += f"\n{len(dataset.refused)} files refused ({kinds}); reasons: {reasons}"
    console.result({"out": options.out, "complete": True, **found.summary}, text)


def _share_is_done(out) -> None:
    said = f"this share is done; {out} appears when the others are, too"
    console.result({"out": out, "complete": False}, said)


def build_config(options):
    """Return the BuildConfig of --config, or that of a single source, with the fields that options set."""
    import dataclasses

    from sora_jax.config import check, from_dict, load
    from sora_jax.data.building.prepare import BuildConfig

    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(BuildConfig) if hasattr(options, f.name)}
    if options.config is None:
        first = next(iter(options.changes), "")
        check(not first, f"--config is not given; it must be the file that --config.{first} changes")
        return BuildConfig(sources=(source_config(options),), **given)
    config = from_dict(BuildConfig, load(options.config, options.changes), "--config")
    several = len(config.sources) > 1
    for flag in (*SOURCE_FLAGS, "world"):
        name, value = flag.replace("_", "-"), getattr(options, flag, None)
        must = f"beside --config with {len(config.sources)} sources it must be a field of --config.sources[i]"
        check(value is None or not several, f"--{name} is {value!r}; {must}")
    if not several:
        given["sources"] = (source_config(options, config.sources[0]),)
    return dataclasses.replace(config, **given)


def training_of(header: dict, file: str | None = None):
    """Return the Training of a config file, else of the one that the build of a dataset named, if it is there."""
    from sora_jax.config import load
    from sora_jax.config_files import find_config
    from sora_jax.data.building.inspect import Training
    from sora_jax.errors import UserError
    from sora_jax.kinds import run_config
    from sora_jax.train.denoiser import DenoiserRun

    name = file or header.get("train_config", "")
    try:
        find_config(name)
    except UserError:
        if file:
            raise
        return None
    config = run_config(load(name))
    if not isinstance(config, DenoiserRun):
        raise UserError(f"--config is {name!r}; it must be the config of a transformer")
    return Training(name, config.packs, config.tokenizer if config.model.text else None, config.split)


def source_config(options, base=None):
    """Return the SourceConfig of the options, which override those of `base`."""
    import dataclasses

    from sora_jax.config import check, choose
    from sora_jax.data.building.prepare import BuildConfig
    from sora_jax.data.sources import SourceConfig
    from sora_jax.worlds.digits import ALLOWED
    from sora_jax.worlds.moving_mnist import MovingMnistConfig
    from sora_jax.worlds.table import NAMED

    values = {field: getattr(options, flag) for flag, field in SOURCE_FLAGS.items() if hasattr(options, flag)}
    kind = values.get("name", base.name if base else SourceConfig.name)
    if kind != "world":
        for flag in ("world", "digits"):
            value = getattr(options, flag, None)
            check(value is None, f"--{flag} is {value!r}; it must be left out but with --source=world")
    elif "name" in values or hasattr(options, "world"):
        name, digits = getattr(options, "world", WORLD), getattr(options, "digits", "")
        world = choose("--world", name, NAMED)
        if isinstance(world, MovingMnistConfig):
            check(digits, f"--digits is not given; with --world={name} it must be {ALLOWED}")
            world = dataclasses.replace(world, digits_path=digits)
        else:
            check(not digits, f"--digits is {digits!r}; with --world={name} it must be left out")
        seed = getattr(options, "seed", BuildConfig.seed)
        holdout = getattr(options, "holdout", BuildConfig.holdout)
        values["world"] = dataclasses.replace(world, seed=seed)
        values["world_held_out"] = round(values.get("limit", 0) * holdout)
    if base and values.get("name", base.name) == base.name:
        return dataclasses.replace(base, **values)
    return SourceConfig(**values)


def encode(options) -> None:
    """Encode a dataset folder into a latent cache."""
    from sora_jax.data.guides import GuideCounts
    from sora_jax.data.shard_spec import ShardSpec
    from sora_jax.data.storing.latents import LatentCache
    from sora_jax.models.pretrained import PretrainedText
    from sora_jax.models.tiling import TilingConfig
    from sora_jax.parallel.settings import prepare_jax
    from sora_jax.train.encode import EncodeOptions, encode_dataset

    prepare_jax()
    text = PretrainedText(options.text_encoder, options.text_tokens) if options.text_encoder else None
    share = ShardSpec.parse(options.shard)
    choose_tile = options.tile == "auto"
    tiles = TilingConfig.parse("" if choose_tile else options.tile, options.tile_overlap)
    folders = options.autoencoder, options.data, options.out
    guides = GuideCounts(options.key_frames, options.sketches)
    how = dict(tiles=tiles, choose_tile=choose_tile, guides=guides, low=options.low)
    chosen = EncodeOptions(options.batch, options.shapes, share, text, **how)
    if encode_dataset(*folders, chosen):
        clips = len(LatentCache(options.out))
        found = {"out": options.out, "complete": True, "clips": clips}
        console.result(found, f"latents of {clips} clips in {options.out}")
    else:
        _share_is_done(options.out)


def caption(options) -> None:
    """Caption the clips of a folder and print what came of it."""
    from sora_jax.data.building.recaption import caption_folder

    written, refused = caption_folder(options.path, options.how, options.out, options.kind)
    found = {"out": options.out, "captioned": written, "refused": refused}
    console.result(found, f"{written} clips captioned in {options.out}, {refused} not readable")


def inspect(options) -> None:
    """Print the summary of a dataset folder."""
    from sora_jax.data.building.inspect import inspect
    from sora_jax.data.packing.packs import PackingConfig
    from sora_jax.data.storing.manifest import Dataset

    slots = PackingConfig.slots if options.slots is None else options.slots
    by_hand = options.pack_length is not None or options.slots is not None
    training = None if by_hand else training_of(Dataset(options.folder).info, options.config)
    found = inspect(options.folder, options.pack_length, slots, options.out, training)
    text = "\n".join([found.text, *(f"{'picture':<16} {path}" for path in found.pictures)])
    console.result({**found.summary, "pictures": found.pictures}, text)
