"""Does a trained CRATE denoise a mixture of low-rank Gaussians as the closed form does, and in which layer?

    python experiments/crate/mixtures.py
    python experiments/crate/mixtures.py --steps=20 --out=/tmp/try     seconds: checks that it runs

The theory (2306.01129, section 2.3) says that on such data a step of MSSA and a step of denoising are one thing. Three
networks of equal depth and about equal size learn to denoise, in equal steps: CRATE; MSSA alone, without ISTA; a
transformer of half the width. After each layer the best linear map of its tokens to the clean ones is fitted on some
sequences and measured on others, against

    clean          the clean tokens: mean square error over mean square of the tokens
    closed form    the exact posterior mean, which needs the true subspaces: what remains of the way to it

and for CRATE the overlap of what each head spans with the true subspace that it overlaps most (1: one holds the
other), the coding rate R_c of the tokens in the true subspaces, and the share of non-zeros. Without training: the
closed forms, the best linear denoiser, and MSSA's step with the true subspaces. Writes mixtures.json and mixtures.png.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from sora_jax.models.crate_blocks import Where, block_specs, compress, mssa_specs, norm_specs, sparsify
from sora_jax.models.transformer import TransformerConfig
from sora_jax.nn.attention import Place, Places, attention
from sora_jax.nn.layers import (
    dense,
    dense_specs,
    layer_norm,
    mlp,
    mlp_specs,
    out_proj,
    out_proj_specs,
    qkv_proj,
    qkv_proj_specs,
)
from sora_jax.nn.params import count, init, stack

sys.path.insert(0, str(Path(__file__).parent))
from rates import nonzero_share, subspace_rate, subspaces_of
from subspace_mixture import Mixture, draw, make_mixture, posterior_mean, project, small_noise_form

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
AXES = ("batch", "length", "width")
EPS = 0.5  # precision of the coding rate
FITTED, MEASURED = 256, 256  # sequences


class Network(NamedTuple):
    """A stack of layers: its specs, and the function of one layer, (params, x, where) -> x."""

    specs: dict
    layer: Callable[[dict, jax.Array, Where], jax.Array]


def crate_layer(p: dict, x: jax.Array, where: Where) -> jax.Array:
    return sparsify(p, compress(p, x, where))


def mssa_layer(p: dict, x: jax.Array, where: Where) -> jax.Array:
    return compress(p, x, where)


def transformer_layer(p: dict, x: jax.Array, where: Where) -> jax.Array:
    q, k, v = qkv_proj(p["qkv"], layer_norm(x))
    place = Place(where.segments_BL)
    x = x + out_proj(p["merge"], attention(q, k, v, Places(place, place)))
    return x + mlp(p["mlp"], layer_norm(x))


def networks(width: int, heads: int, depth: int) -> dict[str, Network]:
    """Make the networks; each begins and ends with a linear map, so that all can choose their basis."""

    def whole(block: dict, inner: int) -> dict:
        ends = {"in": dense_specs(width, inner), "out": dense_specs(inner, width)}
        return {**ends, "blocks": stack(block, depth)}

    half = width // 2
    block = {
        "qkv": qkv_proj_specs(half, 3, heads, half // heads),
        "merge": out_proj_specs(heads, half // heads, half),
        "mlp": mlp_specs(half, int(TransformerConfig.mlp_ratio * half)),
    }
    return {
        "CRATE": Network(whole(block_specs(width, heads), width), crate_layer),
        "MSSA": Network(whole({"norm1": norm_specs(width), "mssa": mssa_specs(width, heads)}, width), mssa_layer),
        "transformer": Network(whole(block, half), transformer_layer),
    }


def tokens_by_layer(network: Network, params: dict, x: jax.Array) -> jax.Array:
    """Return the tokens before the first layer and after each, (depth + 1, B, N, inner)."""
    where = Where(jnp.ones(x.shape[:2], jnp.int32))

    def step(x, p):
        x = network.layer(p, x, where)
        return x, x

    first = dense(params["in"], x, AXES)
    _, rest = jax.lax.scan(step, first, params["blocks"])
    return jnp.concatenate([first[None], rest])


def denoised(network: Network, params: dict, x: jax.Array) -> jax.Array:
    return dense(params["out"], layer_norm(tokens_by_layer(network, params, x)[-1]), AXES)


def train(network: Network, mixture: Mixture, options: argparse.Namespace) -> tuple[dict, list[float]]:
    """Train to denoise fresh sequences; return the parameters, and the error of every step."""
    params = init(network.specs, jax.random.key(options.seed))
    rate = optax.warmup_cosine_decay_schedule(0.0, options.rate, min(100, options.steps // 2), options.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def loss(params, key):
        z, x = draw(mixture, key, (options.batch, options.tokens))
        return jnp.square(denoised(network, params, x) - z).sum(-1).mean() / mixture.U.shape[-1]

    @jax.jit
    def step(carry, number):
        params, state = carry
        key = jax.random.fold_in(jax.random.key(options.seed + 1), number)
        value, gradient = jax.value_and_grad(loss)(params, key)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    carry, losses = (params, optimizer.init(params)), []
    for number in range(options.steps):
        carry, value = step(carry, number)
        losses.append(value)
    return carry[0], [float(value) for value in jax.device_get(losses)]


def readout_errors(fitted: jax.Array, wanted: jax.Array, measured: jax.Array, targets: dict) -> dict[str, float]:
    """Fit the best affine map of `fitted` tokens to `wanted` ones; return the errors of what it makes of `measured`."""

    def flat(x):
        x = np.asarray(x, np.float64)
        return x.reshape(-1, x.shape[-1])

    def with_one(x):
        return np.concatenate([flat(x), np.ones((flat(x).shape[0], 1))], 1)

    weights = np.linalg.lstsq(with_one(fitted), flat(wanted), rcond=1e-8)[0]
    found = with_one(measured) @ weights
    return {name: error(found, flat(target)) for name, target in targets.items()}


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the mean square error over the mean square of what is wanted."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.square(found - wanted).sum() / np.square(wanted).sum())


def overlap(bases: jax.Array, truth: jax.Array) -> float:
    """Return the mean over heads of the largest overlap with a true subspace: 1 where one of the two holds the other.

    It is |U_k^T V|^2 over the smaller number of dimensions; at random the larger one over d.
    """
    overlaps = jnp.square(jnp.einsum("hdp,kdq->hkpq", bases, truth)).sum((-1, -2))
    return float(overlaps.max(1).mean() / min(bases.shape[-1], truth.shape[-1]))


def study(network: Network, params: dict, data: dict, mixture: Mixture) -> list[dict]:
    """Measure the errors of the best linear readout after each layer."""
    run = jax.jit(functools.partial(tokens_by_layer, network))
    fitted, measured = run(params, data["fit_x"]), run(params, data["x"])
    targets = {"clean": data["z"], "closed form": data["best"]}
    return [
        readout_errors(fitted[layer], data["fit_z"], measured[layer], targets) | {"layer": layer}
        for layer in range(len(fitted))
    ]


def look_inside(params: dict, tokens: jax.Array, mixture: Mixture) -> list[dict]:
    """Measure overlap, coding rate and non-zeros of CRATE's layers, in the basis that its first map chooses."""
    truth = jnp.einsum("kdp,de->kep", mixture.U, params["in"]["weight"])
    truth = jnp.linalg.qr(truth)[0]  # where the true subspaces lie in the tokens of the layers
    rate = jax.jit(lambda x: jax.vmap(lambda rows: subspace_rate(layer_norm(rows).T, truth, EPS))(x).mean())
    rows = [{"layer": 0, "R_c": float(rate(tokens[0])), "nonzero": float(nonzero_share(tokens[0]))}]
    for layer in range(1, len(tokens)):
        bases = subspaces_of(jax.tree.map(lambda x, i=layer - 1: x[i], params["blocks"]["mssa"]))
        found = {"overlap": overlap(bases, truth), "R_c": float(rate(tokens[layer]))}
        rows.append({"layer": layer, "nonzero": float(nonzero_share(tokens[layer]))} | found)
    return rows


def without_training(data: dict, mixture: Mixture) -> dict[str, float]:
    """Measure the errors of what needs no training; the last three know the subspaces."""
    x, z = data["x"], data["z"]
    linear = readout_errors(data["fit_x"], data["fit_z"], x, {"clean": z})["clean"]
    return {
        "noisy tokens": error(x, z),
        "best linear": linear,
        "MSSA's step, true subspaces": error(project(mixture, x), z),
        "closed form, small noise": error(small_noise_form(mixture, x), z),
        "closed form, exact": error(posterior_mean(mixture, x), z),
    }


def plot(found: dict, path: Path) -> None:
    """Draw errors by layer against both targets, rates and overlap of CRATE, and losses."""
    figure, ((clean, closed), (inside, losses)) = plt.subplots(2, 2, figsize=(11, 8))
    for axes, target in ((clean, "clean"), (closed, "closed form")):
        for name, network in found["networks"].items():
            values = [row[target] for row in network["layers"]]
            axes.semilogy(range(len(values)), values, marker="o", label=f"{name}, {network['parameters']:,}")
        axes.set(xlabel="layer", ylabel=f"error of the best linear readout against the {target}")
    for i, (name, value) in enumerate(found["without training"].items()):
        clean.axhline(value, color="black", linestyle=("-", "--", "-.", ":", (0, (1, 4)))[i], linewidth=1, label=name)
    clean.legend(fontsize=7)
    rows = found["inside CRATE"]
    inside.plot([r["layer"] for r in rows], [r["nonzero"] for r in rows], marker="o", label="share of non-zeros")
    trained = rows[1:]
    inside.plot([r["layer"] for r in trained], [r["overlap"] for r in trained], marker="s", label="overlap of heads")
    inside.set(xlabel="layer", ylim=(0, 1.05))
    inside.legend(loc="upper right", fontsize=7)
    right = inside.twinx()
    right.plot([r["layer"] for r in rows], [r["R_c"] for r in rows], marker="^", color="tab:green")
    right.set_ylabel("coding rate R_c in the true subspaces, nats (green)")
    for name, network in found["networks"].items():
        losses.loglog(np.arange(1, len(network["losses"]) + 1), network["losses"], label=name, linewidth=0.8)
    losses.axhline(found["without training"]["closed form, exact"], color="black", linewidth=1)
    losses.set(xlabel="step", ylabel="error while training")
    losses.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="d, of a token")
    parser.add_argument("--subspaces", type=int, default=8, help="K, of the mixture and heads of the networks")
    parser.add_argument("--inside", type=int, default=4, help="p, dimensions of a subspace of the mixture")
    parser.add_argument("--sigma", type=float, default=0.5, help="size of the noise")
    parser.add_argument("--tokens", type=int, default=32, help="N, in a sequence")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for mixtures.json and mixtures.png")
    options = parser.parse_args()
    mixture = make_mixture(
        jax.random.key(options.seed), options.subspaces, options.width, options.inside, options.sigma
    )
    fit_z, fit_x = draw(mixture, jax.random.key(options.seed + 2), (FITTED, options.tokens))
    z, x = draw(mixture, jax.random.key(options.seed + 3), (MEASURED, options.tokens))
    data = {"fit_z": fit_z, "fit_x": fit_x, "z": z, "x": x, "best": posterior_mean(mixture, x)}
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    found = {"options": settings, "without training": without_training(data, mixture), "networks": {}}
    for name, network in networks(options.width, options.subspaces, options.depth).items():
        params, losses = train(network, mixture, options)
        layers = study(network, params, data, mixture)
        found["networks"][name] = {"parameters": count(network.specs), "losses": losses, "layers": layers}
        final = error(denoised(network, params, x), z)
        print(f"{name:12} {count(network.specs):>9,} parameters, error {final:.4f}")
        if name == "CRATE":
            tokens = jax.jit(functools.partial(tokens_by_layer, network))(params, x)
            found["inside CRATE"] = look_inside(params, tokens, mixture)
    for name, value in found["without training"].items():
        print(f"{name:28} error {value:.4f}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "mixtures.json").write_text(json.dumps(found, indent=1))
    plot(found, options.out / "mixtures.png")


if __name__ == "__main__":
    main()
