"""Coding rate and sparsity of the tokens in each layer of a trained CRATE, beside its initial weights.

    python experiments/crate/layers.py --workdir=runs/crate --data=data/sprites_latents
    python experiments/crate/layers.py --workdir=runs/classifier --data=data/pictures

The run is a denoiser with CRATE as its network, whose --data is its latent cache, or a classifier, whose --data is its
dataset. Held-out clips are read, or those of the training split where none is held out. For each layer:

R_c        coding rate of the tokens of a clip after the first half, MSSA, in the layer's own subspaces (orthonormal
           bases of them, which rotary positions do not turn here), in nats a token; tokens are first normalised to
           the length sqrt(D), as each half does
R          coding rate of the same tokens in the whole space
non-zeros  share of non-zero entries after the second half, ISTA

2306.01129 (figures 3 and 4) finds that both R_c and non-zeros fall from layer to layer once trained, on ImageNet. A
denoiser is looked at for several noise levels. Prints a table and writes NAME.json and NAME.png.
"""

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from sora_jax.config import read_json
from sora_jax.data.feeding.tokenizer import NoText
from sora_jax.data.packing.packs import PackItem, pack_batch
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.manifest import Dataset, evenly_spread
from sora_jax.diffusion.process import corrupt, process_named
from sora_jax.diffusion.times import per_token
from sora_jax.generate.run import load_run
from sora_jax.kinds import kind_of, stored_config
from sora_jax.kinds.begin import saved_groups
from sora_jax.models import crate, crate_classifier
from sora_jax.models.crate_blocks import compress, sparsify
from sora_jax.nn.layers import layer_norm
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import init
from sora_jax.parallel.mesh import make_mesh, place_batch
from sora_jax.parallel.settings import prepare_jax
from sora_jax.train.adapt import restore_weights
from sora_jax.train.autoencoder import to_float
from sora_jax.train.classifier import ClassifierRun, fits
from sora_jax.train.held_out import HeldOutClips

sys.path.insert(0, str(Path(__file__).parent))
from rates import coding_rate, nonzero_share, subspace_rate, subspaces_of

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
Measures = dict[str, list[float]]


def rates_of(half: jax.Array, whole: jax.Array, subspaces: jax.Array, eps: float) -> tuple[jax.Array, ...]:
    """Return R_c and R (nats a token) of tokens (N, D) after MSSA, and the share of non-zeros of those after ISTA."""
    Z = layer_norm(half.astype(jnp.float32)).T
    n = Z.shape[1]
    return subspace_rate(Z, subspaces, eps) / n, coding_rate(Z, eps) / n, nonzero_share(whole)


def measured(blocks: dict, halves: list, wholes: list, segments_BL: np.ndarray, eps: float) -> Measures:
    """Average `rates_of` over clips, layer by layer; halves and wholes: (B, L, D) of each layer."""
    of_one = jax.jit(functools.partial(rates_of, eps=eps))
    projections = jax.device_get(blocks["mssa"]["subspaces"])
    clips = [(b, s) for b in range(len(segments_BL)) for s in range(1, segments_BL[b].max() + 1)]
    found: Measures = {"R_c": [], "R": [], "non-zeros": []}
    for layer, (half, whole) in enumerate(zip(halves, wholes, strict=True)):
        bases = subspaces_of({"subspaces": {"weight": projections["weight"][layer]}})
        rows = [
            of_one(half[b][segments_BL[b] == s], whole[b][segments_BL[b] == s], bases)
            for b, s in clips
            if (segments_BL[b] == s).any()
        ]
        for name, values in zip(found, np.mean(np.array(rows, np.float64), 0), strict=True):
            found[name].append(float(values))
    return found


def of_denoiser(params: dict, config: Any, pack: Pack, time: float, eps: float) -> Measures:
    """Look at a denoiser at one noise level; the noise is always the same."""
    model, process = config.model, process_named(config.diffusion.process)
    noise_BLP = jax.random.normal(jax.random.key(0), pack.tokens_BLP.shape)
    times_BR = jnp.full(pack.row_slots_BR.shape, time, jnp.float32)
    x_BLP = corrupt(process, pack.tokens_BLP, noise_BLP, per_token(times_BR, pack.rows_BL)[:, :, None])

    @jax.jit
    def run(params, x_BLP, times_BR, pack):
        text = crate.encode_condition(params, model, pack)
        x_BLD, context = crate.enter(params, model, pack, x_BLP, times_BR, text)
        halves, wholes = [], []
        for layer in range(model.depth):
            p = jax.tree.map(lambda x, i=layer: x[i], params["blocks"])
            own = text and text.replace(keys_values=jax.tree.map(lambda x, i=layer: x[i], text.keys_values))
            halves.append(compress(p, x_BLD, context.where, context.modulation))
            x_BLD = crate.block(p, model, x_BLD, context._replace(text=own))
            wholes.append(x_BLD)
        return halves, wholes

    halves, wholes = jax.device_get(run(params, x_BLP, times_BR, pack))
    return measured(params["blocks"], halves, wholes, np.asarray(pack.segments_BL), eps)


def of_classifier(params: dict, config: ClassifierRun, pack: Pack, eps: float) -> Measures:
    """Look at a classifier; class tokens are among an image's tokens."""
    model = config.model

    @jax.jit
    def run(params, pack):
        x_BXD, where = crate_classifier.enter(params, model, pack, to_float(pack.tokens_BLP))
        halves, wholes = [], []
        for layer in range(model.depth):
            p = jax.tree.map(lambda x, i=layer: x[i], params["blocks"])
            halves.append(compress(p, x_BXD, where))
            x_BXD = sparsify(p, halves[-1], model.ista)
            wholes.append(x_BXD)
        return halves, wholes, where.segments_BL

    halves, wholes, segments_BX = jax.device_get(run(params, pack))
    return measured(params["blocks"], halves, wholes, np.asarray(segments_BX), eps)


def denoiser_tables(options: argparse.Namespace) -> Iterator[tuple[str, Measures]]:
    """Yield each curve of a denoiser by its label."""
    run = load_run(options.workdir)
    config = run.config
    with jax.set_mesh(run.mesh):
        cache = LatentCache(options.data)
        clips = HeldOutClips(config, cache, run.tokenizer)
        if not len(clips):
            clips = HeldOutClips(config, cache, run.tokenizer, split=config.split)
        pack = clips.batches()[0].place()
        first = init(crate.denoiser_specs(config.model), jax.random.key(options.seed))
        for time in options.times:
            yield f"trained, t = {time:g}", of_denoiser(run.params, config, pack, time, options.eps)
            yield f"initial, t = {time:g}", of_denoiser(first, config, pack, time, options.eps)


def classifier_tables(options: argparse.Namespace, config: ClassifierRun) -> Iterator[tuple[str, Measures]]:
    """Yield each curve of a classifier by its label."""
    kind, mesh, dataset = kind_of(config), make_mesh(config.mesh), Dataset(options.data)
    groups = functools.partial(saved_groups, kind)
    params, _ = restore_weights(options.workdir, groups, kind.parts(config)[1], mesh)
    splits, good = np.array(dataset.column("split").to_pylist()), fits(config, dataset)
    wanted = np.flatnonzero(good & (splits != config.split))
    chosen = evenly_spread((wanted if len(wanted) else np.flatnonzero(good)).tolist(), options.images)
    items = [PackItem(dataset.item(i), int(dataset.clip_ids[i]), NoText().encode("")) for i in chosen]
    with jax.set_mesh(mesh):
        pack = Pack(**place_batch(pack_batch([[item] for item in items], config.packs), mesh))
        yield "trained", of_classifier(params, config, pack, options.eps)
        first = init(crate_classifier.classifier_specs(config.model), jax.random.key(options.seed))
        yield "initial", of_classifier(first, config, pack, options.eps)


def plot(found: dict[str, Measures], path: Path) -> None:
    """Draw a panel for each measure; dashed lines are of initial weights."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4))
    labels = {"R_c": "R_c after MSSA, nats a token", "R": "R after MSSA, nats a token"}
    colours = {name.partition(", ")[2]: f"C{i // 2}" for i, name in enumerate(found)}
    for axes, measure in zip(panels, ("R_c", "R", "non-zeros"), strict=True):
        for name, rows in found.items():
            state, _, level = name.partition(", ")
            line = "-" if state == "trained" else "--"
            layers = range(1, len(rows[measure]) + 1)
            axes.plot(layers, rows[measure], line, marker=".", color=colours[level], label=name)
        axes.set(xlabel="layer", ylabel=labels.get(measure, "share of non-zeros after ISTA"))
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="run of a denoiser or of a classifier")
    parser.add_argument("--data", type=Path, required=True, help="its latent cache, or its dataset")
    parser.add_argument("--times", type=float, nargs="*", default=[0.1, 0.5, 0.9], help="noise levels of a denoiser")
    parser.add_argument("--images", type=int, default=64, help="images that a classifier is looked at with")
    parser.add_argument("--eps", type=float, default=0.5, help="precision of the coding rates")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--out", type=Path, help="name of the .json and .png; default: by the kind, beside this")
    options = parser.parse_args()
    prepare_jax()
    config = stored_config(read_json(options.workdir / "config.json"))
    classifies = isinstance(config, ClassifierRun)
    if not classifies and not isinstance(config.model, crate.CrateConfig):
        raise SystemExit(f"--workdir is {str(options.workdir)!r}; its network is {config.model.name!r}, not 'crate'")
    found = dict(classifier_tables(options, config) if classifies else denoiser_tables(options))
    out = options.out or HERE / f"layers_{config.kind}"
    for name, rows in found.items():
        for measure, values in rows.items():
            print(f"{name:20} {measure:10}", " ".join(f"{value:8.4f}" for value in values))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(found, indent=1))
    plot(found, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
