"""Forward pass and training step of a DiT: sora_jax against PyTorch running the DiT of diffusers.

    python experiments/bench/dit_versus_torch.py             about ten minutes on two cores
    python experiments/bench/dit_versus_torch.py --quick     a tiny model; says nothing about speed

Needs `sora_jax[test-peers]` and, for torch.compile, a C++ compiler. 8 latents of 32 x 32 x 4 with the same weights,
noise, steps and classes on both sides, float32, two threads. A step is DiT's: squared error and variational bound,
AdamW, no averages. Each side has its own process; they are asked in turns, round by round. The outputs and the first
loss must agree. Prints Markdown.
"""

import argparse
import functools
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from timing import machine, middle_half, milliseconds, report
from workers import Worker, alternate, conditions, prepare, serve

SIZES = {"S/2": (12, 384, 6, 2), "B/4": (12, 768, 12, 4), "tiny": (2, 48, 2, 2)}
BATCH, SIDE = 8, 32
TOLERANCE = 1e-4  # relative, of the loss and of the size of the outputs
HEADER = ("model", "what", "sora_jax ms", "PyTorch eager ms", "compiled ms", "sora_jax / the better PyTorch")


def make_data() -> dict[str, np.ndarray]:
    """Clean latents, noise (B, C, H, W), steps from 1 on, classes (B,)."""
    draws = np.random.default_rng(0)
    shape = (BATCH, 4, SIDE, SIDE)
    return {
        "x0": draws.standard_normal(shape, np.float32),
        "eps": draws.standard_normal(shape, np.float32),
        "steps": draws.integers(1, 1000, BATCH),
        "classes": draws.integers(0, 1000, BATCH),
    }


def torch_side(size: str, folder: Path, compiled: bool, processor_time: bool) -> None:
    """Saves the weights, then serves forward and step, eager and compiled."""
    threads = prepare(processor_time)
    import torch
    from torch_dit import Tables, adamw, hybrid_loss, make_model, save

    torch.set_num_threads(threads)
    model = make_model(*SIZES[size], SIDE)
    save(model, folder)
    tables, optimizer = Tables(), adamw(model)
    data = {name: torch.from_numpy(values) for name, values in make_data().items()}
    x0, eps, steps = data["x0"], data["eps"], data["steps"]

    def forward(network):
        with torch.no_grad():
            return float(network(eps, steps, data["classes"], return_dict=False)[0].square().mean())

    def step(network):
        optimizer.zero_grad()
        x = tables.signal[steps][:, None, None, None] * x0 + tables.noise[steps][:, None, None, None] * eps
        loss = hybrid_loss(tables, network(x, steps, data["classes"], return_dict=False)[0], x0, x, eps, steps)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    networks = {"eager": model} | ({"compiled": torch.compile(model)} if compiled else {})
    runs = {f"forward-{name}": functools.partial(forward, network) for name, network in networks.items()}
    first = {"first-forward": constant(forward(model)), "first-step": constant(step(model))}
    runs |= {f"step-{name}": functools.partial(step, network) for name, network in networks.items()}
    serve(first | runs, processor_time)


def jax_side(folder: Path, remat: str, processor_time: bool) -> None:
    """Reads the weights, then serves forward and step: the package's own model, loss and `make_step`."""
    prepare(processor_time)
    import dataclasses

    from jax_dit import make_runs

    from sora_jax.convert.dit import read_diffusers
    from sora_jax.data.packing.packs import PackingConfig, PackItem, pack_batch, patchify

    network = read_diffusers(folder)
    config = dataclasses.replace(network.config, remat=remat, dtype="float32")
    data = make_data()
    x0, eps = (np.moveaxis(data[name], 1, -1)[:, None] for name in ("x0", "eps"))  # (B, 1, H, W, C)
    items = [
        [PackItem(latent, clip_id, np.array([0]), label=label)]
        for clip_id, (latent, label) in enumerate(zip(x0, data["classes"], strict=True), 1)
    ]
    packing = PackingConfig(length=(SIDE // config.patch[1]) ** 2, slots=1, text_length=1, patch=config.patch)
    host = {
        "pack": pack_batch(items, packing),
        "eps_BLP": np.stack([patchify(latent, config.patch) for latent in eps]),
        "times_BR": ((data["steps"] + 1) / 1000).astype(np.float32)[:, None],
    }
    forward, step = make_runs(config, network.params, [host])
    first = {"first-forward": constant(forward()), "first-step": constant(step())}
    serve(first | {"forward": forward, "step": step}, processor_time)


def flags(options) -> list[str]:
    """What both sides need to know."""
    named = {"--eager-only": options.quick or options.eager_only, "--processor-time": options.processor_time}
    return [f"--remat={options.remat}", *(name for name, on in named.items() if on)]


def constant(value: float):
    return lambda: value


def measure(size: str, rounds: int, flags: list[str]) -> list[list[str]]:
    """Two rows of the table; AssertionError where the sides do not compute the same."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = f"--size={size}", f"--folder={folder}", *flags
        workers = {"torch": Worker("torch", *arguments)}
        workers["jax"] = Worker("jax", *arguments)
        for what in ("forward", "step"):
            ours, theirs = (workers[side].ask(f"first-{what}")[1] for side in ("jax", "torch"))
            print(f"{size}: loss of the first {what}: {ours:.6f} and {theirs:.6f}", flush=True)
            assert abs(ours - theirs) <= TOLERANCE * theirs, f"{size}: {what} {ours}, PyTorch {theirs}"
        seconds = alternate(workers, rounds)
        for worker in workers.values():
            worker.close()
    return [row(size, what, seconds) for what in ("forward", "step")]


def row(size: str, what: str, seconds: dict[str, list[float]]) -> list[str]:
    ours, eager = seconds[f"jax {what}"], seconds[f"torch {what}-eager"]
    compiled = seconds.get(f"torch {what}-compiled")
    better = min([eager, compiled or eager], key=median)
    ratios = np.array(ours) / np.array(better)
    return [
        f"DiT-{size}",
        {"forward": "forward", "step": "train step"}[what],
        milliseconds(ours),
        milliseconds(eager),
        milliseconds(compiled) if compiled else "",
        f"**{median(ours) / median(better):.2f}** ({middle_half(ratios)})",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", default="S/2,B/4")
    parser.add_argument("--remat", default="dots", help="what the backward pass of sora_jax keeps: none, dots, full")
    parser.add_argument("--processor-time", action="store_true", help="one thread a side; for a busy machine")
    parser.add_argument("--eager-only", action="store_true", help="without torch.compile")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds, without torch.compile")
    for internal in ("--side", "--size", "--folder"):
        parser.add_argument(internal, default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "torch":
        return torch_side(options.size, Path(options.folder), not options.eager_only, options.processor_time)
    if options.side == "jax":
        return jax_side(Path(options.folder), options.remat, options.processor_time)
    measured_on = machine()
    sizes, rounds = ("tiny", 2) if options.quick else (options.sizes, options.rounds)
    rows = []
    for size in sizes.split(","):
        rows += measure(size, rounds, flags(options))
    notes = (
        f"8 latents of 32 x 32 x 4, float32, {conditions(options.processor_time)}. Medians of {rounds} rounds, a call"
        f" of each in turn; in brackets the middle half of the ratios of single rounds. remat {options.remat!r}."
    )
    print(report(HEADER, rows, notes, measured_on))


if __name__ == "__main__":
    main()
