"""Golden files of networks from `diffusers` and from a plain PyTorch DiT, for tests that need neither.

    pip install -e .[test-peers]
    python tests/peers/make_model_goldens.py            writes tests/goldens_models/*.npz
    python tests/peers/make_model_goldens.py --check    compares them with the peer that is installed

Weights are not stored: `tensors.random_weights` makes them of their names and shapes. All is computed in float64.

The DiT of diffusers is run with the two constants that the official code has and diffusers' own defaults have not:
time frequencies 10000^(-i/128) for 10000^(-i/127), and 1e-6 for 1e-5 in the norm before the MLP.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from tensors import random_weights, uniform

FOLDER = Path(__file__).parents[1] / "goldens_models"
VAES = {  # options of AutoencoderKL; the picture is no square
    "kl4": dict(latent_channels=4, use_quant_conv=True, use_post_quant_conv=True),
    "kl16": dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
}
LEVELS = 3
WANS = {  # options of AutoencoderKLWan: the releases 2.1 and 2.2, narrow
    "wan21": dict(base_dim=8, decoder_base_dim=12, z_dim=4, num_res_blocks=1),
    "wan22": dict(
        base_dim=8, decoder_base_dim=12, z_dim=6, num_res_blocks=2, is_residual=True, patch_size=2, in_channels=12,
        out_channels=12, scale_factor_spatial=16,
    ),
}  # fmt: skip
WAN_22 = dict(WANS["wan22"], base_dim=160, decoder_base_dim=256, z_dim=48)
FRAMES, WAN_PIXELS = 13, (16, 32)
STEPS, LABELS = (0, 500, 999), (1, 10, 4)  # label 10 is the row for none
TIMES = (0.0, 0.3, 0.99)  # of SiT
WIDTH, GRID = 24, 4  # of the DiT and SiT in plain PyTorch
GUIDANCE = 4.0
TOLERANCE = 1e-6


def vae(name: str) -> dict:
    """Posterior and reconstruction of two pictures."""
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        **VAES[name],
    )
    shapes = fill(model)
    picture, latent = given("picture", (2, 3, 16, 24)) / 2, given("latent", (2, VAES[name]["latent_channels"], 4, 6))
    with torch.no_grad():
        posterior = model.encode(picture).latent_dist
        decoded = model.decode(latent).sample
    meta = {"config": settings(model), "shapes": shapes}
    values = {"picture": picture, "mean": posterior.mean, "logvar": posterior.logvar, "latent": latent}
    return pack(meta, values | {"decoded": decoded})


def wan(name: str) -> dict:
    """Posterior and reconstruction of a clip; those of its first frames alone are the first of these."""
    options = WANS[name]
    statistics = {"latents_mean": [0.0] * options["z_dim"], "latents_std": [1.0] * options["z_dim"]}
    model = diffusers.AutoencoderKLWan(**options, **statistics)
    shapes = fill(model)
    height, width = WAN_PIXELS
    factor, latents = options.get("scale_factor_spatial", 8), 1 + (FRAMES - 1) // 4
    video = given("video", (1, 3, FRAMES, height, width)) / 2
    latent = given("latent", (1, options["z_dim"], latents, height // factor, width // factor))
    with torch.no_grad():
        posterior, image = (model.encode(x).latent_dist for x in (video, video[:, :, :1]))
        with mock.patch.object(torch, "clamp", lambda x, **_: x):  # the peer clips the result
            decoded, fewer = (model.decode(z).sample for z in (latent, latent[:, :, :2]))
    for some, whole in ((image.mean, posterior.mean), (fewer, decoded)):
        torch.testing.assert_close(some, whole[:, :, : some.shape[2]], rtol=0, atol=1e-12)
    meta = {"config": settings(model), "shapes": shapes}
    return pack(meta, {"mean": posterior.mean, "logvar": posterior.logvar, "latent": latent, "decoded": decoded})


def full_size() -> dict:
    """The number of parameters of the autoencoders of full size; of Wan's also those of encoder and decoder."""
    counts: dict[str, int | list[int]] = {}
    with torch.device("meta"):
        for name, options in VAES.items():
            model = diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                **options,
            )
            counts[name] = sum(p.numel() for p in model.parameters())
        for name, options in (("wan21", {}), ("wan22", WAN_22)):
            model = diffusers.AutoencoderKLWan(**options)
            counts[name] = [sum(p.numel() for p in m.parameters()) for m in (model, model.encoder, model.decoder)]
    return pack({"parameters": counts}, {})


def diffusers_dit() -> dict:
    """A forward pass, guided predictions, and the terms and gradients of DiT's loss."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_eps=1e-6,
    )  # fmt: skip
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    shapes = fill(model, first_copy)

    def network(x, steps, labels):
        return model(x, timestep=steps, class_labels=labels).sample

    meta = {"config": settings(model), "shapes": shapes}
    return pack(meta, outputs(network, list(model.named_parameters())))


def official_dit() -> dict:
    """The same of a DiT in plain PyTorch, with the names of the official checkpoint."""
    network, weights, shapes = official_network()
    values = outputs(network, list(weights.items()))
    return pack({"shapes": shapes}, values | {"pos_embed": positions_of(WIDTH, GRID)[None]})


def official_sit() -> dict:
    """Velocities of a SiT at its own times, which run from noise to data, and guided ones; the weights are DiT's.

    SiT computes the second half of its outputs and does not use it.
    """
    network, _, shapes = official_network()
    times, labels, x = torch.tensor(TIMES, dtype=torch.float64), torch.tensor(LABELS), given("x", (3, 4, 8, 8))
    with torch.no_grad():
        out, none = (network(x, times, which)[:, :4] for which in (labels, torch.full_like(labels, 10)))
    return pack({"shapes": shapes}, {"x": x, "out": out, "guided_3": guide(out, none, 3)})


def official_network():
    """A function of (images, times as shown, labels), its weights, and their shapes by official names."""
    width, depth = WIDTH, 2
    linear = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width), "final_layer.linear": (32, width)}
    linear["final_layer.adaLN_modulation.1"] = (2 * width, width)
    for i in range(depth):
        sizes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width)}
        sizes |= {"mlp.fc2": (width, 4 * width), "adaLN_modulation.1": (6 * width, width)}
        linear |= {f"blocks.{i}.{name}": shape for name, shape in sizes.items()}
    shapes = {"x_embedder.proj.weight": (width, 4, 2, 2), "x_embedder.proj.bias": (width,)}
    shapes |= {"y_embedder.embedding_table.weight": (11, width)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    weights = {name: torch.tensor(x, dtype=torch.float64) for name, x in random_weights(shapes).items()}
    positions = positions_of(width, GRID)
    for x in weights.values():
        x.requires_grad_()

    def network(x, times, labels):
        return plain_dit(weights, positions, depth, 2, x, times, labels)

    return network, weights, {name: list(shape) for name, shape in shapes.items()}


def guide(out, none, channels: int):
    """Guided predictions of the first channels; those of `out` for the others."""
    part = none[:, :channels] + GUIDANCE * (out - none)[:, :channels]
    return torch.cat([part, out[:, channels:]], dim=1)


def plain_dit(p: dict, positions, depth: int, heads: int, x, steps, labels):
    """(N, C, H, W), (N,), (N,) -> (N, 2 C, H, W), written from the description of 2212.09748."""

    def linear(name, value):
        return value @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(value):
        return F.layer_norm(value, value.shape[-1:], eps=1e-6)

    patch = p["x_embedder.proj.weight"].shape[-1]
    images, _, height, width = x.shape
    tokens = F.conv2d(x, p["x_embedder.proj.weight"], p["x_embedder.proj.bias"], stride=patch)
    tokens = tokens.flatten(2).transpose(1, 2) + positions
    angles = steps[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
    time = torch.cat([angles.cos(), angles.sin()], dim=1)
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", time)))
    condition = F.silu(time + p["y_embedder.embedding_table.weight"][labels])[:, None]
    for i in range(depth):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"blocks.{i}.adaLN_modulation.1", condition).chunk(6, -1)
        qkv = linear(f"blocks.{i}.attn.qkv", norm(tokens) * (1 + scale1) + shift1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v
        tokens = tokens + gate1 * linear(f"blocks.{i}.attn.proj", mixed.transpose(1, 2).flatten(2))
        hidden = linear(f"blocks.{i}.mlp.fc1", norm(tokens) * (1 + scale2) + shift2)
        tokens = tokens + gate2 * linear(f"blocks.{i}.mlp.fc2", F.gelu(hidden, approximate="tanh"))
    shift, scale = linear("final_layer.adaLN_modulation.1", condition).chunk(2, -1)
    out = linear("final_layer.linear", norm(tokens) * (1 + scale) + shift)
    out = out.reshape(images, height // patch, width // patch, patch, patch, -1)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(images, -1, height, width)


def positions_of(width: int, grid: int):
    """Sines and cosines, one token after another: the first half of the column, the second of the row."""
    table = torch.zeros(grid * grid, width, dtype=torch.float64)
    quarter = width // 4
    for token in range(grid * grid):
        for start, place in ((0, token % grid), (width // 2, token // grid)):
            for i in range(quarter):
                angle = place / 10_000 ** (i / quarter)
                table[token, start + i], table[token, start + quarter + i] = math.sin(angle), math.cos(angle)
    return table


def outputs(network, parameters: list) -> dict:
    """What is compared of a DiT."""
    steps, labels = torch.tensor(STEPS), torch.tensor(LABELS)
    x, x0, eps = (given(name, (3, 4, 8, 8)) for name in ("x", "x0", "eps"))
    with torch.no_grad():
        out, none = network(x, steps, labels), network(x, steps, torch.full_like(labels, 10))
        guided = {f"guided_{channels}": guide(out, none, channels) for channels in (3, 4)}
    mse, bits = loss_terms(network, x0, eps, steps, labels)
    (mse + bits).mean().backward()
    gradients = {}
    for name, parameter in parameters:  # of weights that are tied, the sum over the copies
        owner = first_copy(name)
        gradients[owner] = gradients.get(owner, 0) + parameter.grad
    values = {"x": x, "out": out, **guided, "x0": x0, "eps": eps, "mse": mse.detach(), "bits": bits.detach()}
    return values | {f"gradient/{name}": value for name, value in gradients.items()}


def loss_terms(network, x0, eps, steps, labels):
    """Squared error and bound (bits) of each image: 2212.09748, and 2102.09672, equations 10 to 16.

    The likelihood of the first step's bins takes a tanh for the normal distribution function, as the official code.
    """
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    narrow = beta * (1 - before) / (1 - kept)
    at = lambda values: values[steps][:, None, None, None]  # noqa: E731
    x = at(kept).sqrt() * x0 + (1 - at(kept)).sqrt() * eps
    predicted, share = network(x, steps, labels).chunk(2, dim=1)
    mse = (predicted - eps).square().mean((1, 2, 3))
    found = (x - (1 - at(kept)).sqrt() * predicted.detach()) / at(kept).sqrt()
    low = at(torch.cat([narrow[1:2], narrow[1:]]).log())
    log_variance = low + (share + 1) / 2 * (at(beta).log() - low)
    off = at(before.sqrt() * beta / (1 - kept)) * (x0 - found)
    divergence = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + off.square() * (-log_variance).exp())
    to_mean = (x0 - found) * (-0.5 * log_variance).exp()
    half = (-0.5 * log_variance).exp() / 255
    upper, lower = (
        (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2 for z in (to_mean + half, to_mean - half)
    )
    one, zero = torch.ones_like(x0), torch.zeros_like(x0)
    inside = torch.where(x0 > 0.999, one, upper) - torch.where(x0 < -0.999, zero, lower)
    likelihood = -inside.clamp(min=1e-12).log()
    bits = torch.where(at(torch.arange(1000)) == 0, likelihood, divergence) / math.log(2)
    return mse, bits.mean((1, 2, 3))


def fill(model, tied=lambda name: name) -> dict:
    """Gives a model its weights; returns their shapes. `tied`: the name whose values a tensor has."""
    model.double().train(False)
    shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    values = random_weights({tied(name): shape for name, shape in shapes.items()})
    model.load_state_dict({name: torch.tensor(values[tied(name)]).double() for name in shapes})
    return shapes


def settings(model) -> dict:
    """What config.json says of a network."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def first_copy(name: str) -> str:
    """The embeddings that the blocks of diffusers' DiT share, under the name that the first has."""
    block, _, rest = name.removeprefix("transformer_blocks.").partition(".")
    return f"transformer_blocks.0.{rest}" if block.isdigit() and rest.startswith("norm1.emb.") else name


def given(name: str, shape: tuple[int, ...]):
    return torch.tensor(uniform(name, shape), dtype=torch.float64)


def pack(meta: dict, values: dict) -> dict:
    """Arrays to save, and what they were made with."""
    meta |= {"diffusers": diffusers.__version__, "torch": torch.__version__.partition("+")[0]}
    arrays = {name: np.asarray(x.detach() if torch.is_tensor(x) else x, np.float32) for name, x in values.items()}
    return arrays | {"meta": np.array(json.dumps(meta))}


CASES = {
    "kl4": lambda: vae("kl4"),
    "kl16": lambda: vae("kl16"),
    "wan21": lambda: wan("wan21"),
    "wan22": lambda: wan("wan22"),
    "parameters": full_size,
    "dit_diffusers": diffusers_dit,
    "dit_official": official_dit,
    "sit_official": official_sit,
}


def compare(name: str, made: dict) -> bool:
    """Prints how far the stored arrays are from the peer's; whether all are near."""
    with np.load(FOLDER / f"{name}.npz") as file:
        stored = dict(file)
    if stored.keys() != made.keys():
        print(f"{name}: other arrays: {sorted(stored.keys() ^ made.keys())}")
        return False
    old, new = (json.loads(str(x["meta"])) for x in (stored, made))
    versions = {key: (old.pop(key), new.pop(key)) for key in ("diffusers", "torch")}
    if old != new:
        print(f"{name}: made with other {' and '.join(key for key in old if old[key] != new.get(key))}")
        return False
    errors = {"nothing": 0.0}
    for key in stored.keys() - {"meta"}:
        errors[key] = np.abs(stored[key] - made[key]).max() / max(np.abs(made[key]).max(), 1e-12)
    worst = max(errors, key=errors.get)
    said = ", ".join(f"{peer} {a} -> {b}" for peer, (a, b) in versions.items())
    print(f"{name}: {said}: at most {errors[worst]:.1e}, of {worst}")
    return errors[worst] < TOLERANCE


def main(about: str, cases: dict) -> int:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the stored files with the installed peer")
    check, good = parser.parse_args().check, True
    for name, make in cases.items():
        made = make()
        if check:
            good &= compare(name, made)
        else:
            FOLDER.mkdir(exist_ok=True)
            np.savez_compressed(FOLDER / f"{name}.npz", **made)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(__doc__, CASES))
