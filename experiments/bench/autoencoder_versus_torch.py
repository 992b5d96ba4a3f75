"""Encode and decode by imported autoencoders: sora_jax against PyTorch running those of diffusers.

    python experiments/bench/autoencoder_versus_torch.py             some minutes on two cores
    python experiments/bench/autoencoder_versus_torch.py --quick     tiny models; says nothing about speed

Needs `sora_jax[test-peers]`. Same random weights and inputs on both sides, float32, two threads. kl4 is the autoencoder
of Stable Diffusion in full width (84 million parameters) on one image; wan is that of Wan 2.1, 32 wide, on one clip.
Each side has its own process; they are asked in turns, round by round. The results must agree. Prints Markdown.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from timing import machine, middle_half, milliseconds, report
from workers import Worker, alternate, conditions, prepare, serve

KL = ("DownEncoderBlock2D", "UpDecoderBlock2D")
# Class of diffusers, its options, size (frames, height, width) of the input, and pixels to a latent position.
MODELS = {
    "kl4": ("AutoencoderKL", dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2), (1, 256, 256), 8),
    "wan": ("AutoencoderKLWan", dict(base_dim=32), (9, 128, 128), 8),
    "kl4-tiny": ("AutoencoderKL", dict(block_out_channels=(32, 32), layers_per_block=1), (1, 32, 32), 2),
    "wan-tiny": ("AutoencoderKLWan", dict(base_dim=4), (5, 32, 32), 8),
}
TOLERANCE = 1e-4  # relative, of the size of the results
HEADER = ("model", "what", "sora_jax ms", "PyTorch ms", "sora_jax / PyTorch")


def make_data(name: str, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """A clip (1, T, H, W, 3) in [-1, 1] and latents (1, t, h, w, C)."""
    class_name, _, (frames, height, width), factor = MODELS[name]
    latents = 1 + (frames - 1) // 4 if class_name == "AutoencoderKLWan" else frames
    draws = np.random.default_rng(0)
    video = draws.uniform(-1, 1, (1, frames, height, width, 3)).astype(np.float32)
    return video, draws.standard_normal((1, latents, height // factor, width // factor, channels), np.float32)


def torch_side(name: str, folder: Path, processor_time: bool) -> None:
    """Saves the weights, then serves encode and decode."""
    threads = prepare(processor_time)
    import diffusers
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    class_name, options, *_ = MODELS[name]
    if class_name == "AutoencoderKL":
        widths = options["block_out_channels"]
        options = options | {
            side: (block,) * len(widths) for side, block in zip(("down_block_types", "up_block_types"), KL)
        }
    model = getattr(diffusers, class_name)(**options).eval()
    model.save_pretrained(folder)
    is_image = class_name == "AutoencoderKL"
    channels = model.config["latent_channels" if is_image else "z_dim"]
    video, latents = (torch.from_numpy(np.moveaxis(x, -1, 1).copy()) for x in make_data(name, channels))
    video, latents = (x[:, :, 0] if is_image else x for x in (video, latents))

    def encode():
        with torch.no_grad():
            return float(model.encode(video).latent_dist.mean.square().mean())

    def decode():
        with torch.no_grad():
            return float(model.decode(latents).sample.clip(-1, 1).square().mean())

    serve({"encode": encode, "decode": decode}, processor_time)


def jax_side(name: str, folder: Path, processor_time: bool) -> None:
    """Reads the weights, then serves encode and decode."""
    prepare(processor_time)
    import dataclasses

    import jax
    import jax.numpy as jnp

    from sora_jax.convert.vae import read_vae
    from sora_jax.models.first_stage import decode, encode

    found = read_vae(folder)
    config = dataclasses.replace(found.config, dtype="float32", remat=False)
    video, latents = make_data(name, config.latent_channels)
    params = found.params

    encoded = jax.jit(lambda p, x: jnp.square(encode(p, config, x)[0]).mean())
    decoded = jax.jit(lambda p, z: jnp.square(jnp.clip(decode(p, config, z), -1, 1)).mean())
    runs = {
        "encode": lambda: float(encoded(params, video)),
        "decode": lambda: float(decoded(params, latents)),
    }
    serve(runs, processor_time)


def measure(name: str, rounds: int, flags: list[str]) -> list[list[str]]:
    """Two rows of the table; AssertionError where the sides do not compute the same."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = f"--model={name}", f"--folder={folder}", *flags
        workers = {"torch": Worker("torch", *arguments)}
        workers["jax"] = Worker("jax", *arguments)
        for what in ("encode", "decode"):
            ours, theirs = (workers[side].ask(what)[1] for side in ("jax", "torch"))
            print(f"{name}: mean square of what {what} returns: {ours:.6f} and {theirs:.6f}", flush=True)
            assert abs(ours - theirs) <= TOLERANCE * theirs, f"{name}: {what} {ours}, PyTorch {theirs}"
        seconds = alternate(workers, rounds)
        for worker in workers.values():
            worker.close()
    return [row(name, what, seconds[f"jax {what}"], seconds[f"torch {what}"]) for what in ("encode", "decode")]


def row(name: str, what: str, ours: list[float], theirs: list[float]) -> list[str]:
    ratios = np.array(ours) / np.array(theirs)
    shown = f"**{median(ours) / median(theirs):.2f}** ({middle_half(ratios)})"
    return [name, what, milliseconds(ours), milliseconds(theirs), shown]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default="kl4,wan")
    parser.add_argument("--processor-time", action="store_true", help="one thread a side; for a busy machine")
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds")
    for internal in ("--side", "--model", "--folder"):
        parser.add_argument(internal, default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sides = {"torch": torch_side, "jax": jax_side}
    if options.side:
        return sides[options.side](options.model, Path(options.folder), options.processor_time)
    measured_on = machine()
    models, rounds = ("kl4-tiny,wan-tiny", 2) if options.quick else (options.models, options.rounds)
    flags = ["--processor-time"] if options.processor_time else []
    rows = [line for name in models.split(",") for line in measure(name, rounds, flags)]
    sizes = "; ".join(f"{name} {' x '.join(map(str, MODELS[name][2]))}" for name in models.split(","))
    notes = (
        f"Pixels: {sizes}. Float32, {conditions(options.processor_time)}. Medians of {rounds} rounds, a call of each in"
        " turn; in brackets the middle half of the ratios of single rounds."
    )
    print(report(HEADER, rows, notes, measured_on))


if __name__ == "__main__":
    main()
