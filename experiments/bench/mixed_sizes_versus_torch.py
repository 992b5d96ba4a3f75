"""Images per second of a DiT on mixed sizes: packs here against PyTorch, padded or one call per size.

    python experiments/bench/mixed_sizes_versus_torch.py             about ten minutes on two cores
    python experiments/bench/mixed_sizes_versus_torch.py --quick     a tiny model; says nothing about speed

Needs `sora_jax[test-peers]`. DiT-S/2 on images with sides of 64 to 256 pixels, each side drawn by itself: latents of 8
to 32 rows and columns. One set of images, weights, noise, steps and classes on both sides; the set is that of 16 full
packs of 256 tokens, as long as the largest image. It is trained on in two updates, and passed forward. PyTorch takes it

- padded to the largest: 8 images a call, and so more updates. No attention mask, which is wrong but faster;
- in one call per size, gradients added up to as many updates as the packs have. The first loss must be that of packs.
"""

import argparse
import functools
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from timing import machine, middle_half, report
from workers import Worker, alternate, conditions, prepare, serve

MODELS = {"S/2": (12, 384, 6, 2), "tiny": (2, 48, 2, 2)}
LARGEST, PACKS, ROWS, SLOTS = 32, 16, 8, 16
PATCH = 2
LENGTH = (LARGEST // PATCH) ** 2
TOLERANCE = 1e-4
HEADER = ("what", "layout", "calls", "seconds", "images/s", "packed / this")
LAYOUTS = {"packed": "jax", "padded-eager": "torch", "padded-compiled": "torch", "per-size-eager": "torch"}


def make_images() -> list[list[dict]]:
    """The images of each update: clean latent x0 and noise eps (H, W, C), step, class."""
    from sora_jax.data.packing.packs import PackingConfig
    from sora_jax.data.packing.planning import plan

    draws = np.random.default_rng(0)
    sides = 2 * draws.integers(4, LARGEST // 2 + 1, (400, 2))
    tokens = sides.prod(1) // PATCH**2
    planned = plan(0, 0, tokens, np.ones_like(tokens), PackingConfig(LENGTH, SLOTS, SLOTS, window=400))
    fullest = sorted(range(len(planned)), key=lambda p: -tokens[planned[p]].sum())[:PACKS]
    packs = [[image(draws, sides[i]) for i in planned[p]] for p in fullest]
    return [packs[:ROWS], packs[ROWS:]]


def image(draws, sides) -> dict:
    x0, eps = draws.standard_normal((2, *sides, 4), np.float32)
    return {"x0": x0, "eps": eps, "step": int(draws.integers(1, 1000)), "class": int(draws.integers(0, 1000))}


def torch_side(size: str, folder: Path, compiled: bool, processor_time: bool) -> None:
    threads = prepare(processor_time)
    import torch
    from torch_dit import Tables, adamw, hybrid_loss, make_model, save, token_outputs, tokens_of

    torch.set_num_threads(threads)
    model = make_model(*MODELS[size], LARGEST)
    save(model, folder)
    tables, optimizer = Tables(), adamw(model)
    updates = [[i for pack in packs for i in pack] for packs in make_images()]
    padded = [[stacked(images[at : at + 8], LARGEST) for at in range(0, len(images), 8)] for images in updates]
    by_size = [[stacked(group) for group in equal_sizes(images)] for images in updates]

    def loss_of(network, batch):
        x0, eps = (tokens_of(torch.from_numpy(batch[name]), PATCH) for name in ("x0", "eps"))
        latents = torch.from_numpy(batch["x0"])
        steps, classes, real = (torch.from_numpy(batch[name]) for name in ("step", "class", "real"))
        signal, noise = (table[steps][:, None, None, None] for table in (tables.signal, tables.noise))
        x = signal * latents + noise * torch.from_numpy(batch["eps"])
        output = network(model, x, steps, classes)
        return hybrid_loss(tables, output, x0, tokens_of(x, PATCH), eps, steps, real)

    def forward(network, batches):
        with torch.no_grad():
            for batch in sum(batches, []):
                arrays = (torch.from_numpy(batch[name]) for name in ("x0", "step", "class"))
                network(model, *arrays)
        return 0.0

    def train(network, batches, each: bool):
        total = 0.0
        for update in batches:
            real = sum(batch["real"].sum() for batch in update)
            optimizer.zero_grad()
            for batch in update:
                loss = loss_of(network, batch) / (batch["real"].sum() if each else real)
                loss.backward()
                total += float(loss.detach())
                if each:
                    optimizer.step()
                    optimizer.zero_grad()
            if not each:
                optimizer.step()
        return total

    first = sum(float(loss_of(token_outputs, batch).detach()) for batch in by_size[0])
    real = sum(batch["real"].sum() for batch in by_size[0])
    runs = {"first": constant(first / float(real))}
    networks = {"eager": token_outputs} | ({"compiled": torch.compile(token_outputs)} if compiled else {})
    for name, network in networks.items():
        runs[f"forward:padded-{name}"] = functools.partial(forward, network, padded)
        runs[f"train:padded-{name}"] = functools.partial(train, network, padded, True)
    runs["forward:per-size-eager"] = functools.partial(forward, token_outputs, by_size)
    runs["train:per-size-eager"] = functools.partial(train, token_outputs, by_size, False)
    serve(runs, processor_time)


def equal_sizes(images: list[dict]) -> list[list[dict]]:
    groups = {}
    for one in images:
        groups.setdefault(one["x0"].shape, []).append(one)
    return list(groups.values())


def stacked(images: list[dict], side: int = 0) -> dict[str, np.ndarray]:
    """A batch in PyTorch's layout, every image padded to side x side; real (B, L) says which tokens are the image's."""
    height, width = (side, side) if side else images[0]["x0"].shape[:2]
    batch = {name: np.zeros((len(images), 4, height, width), np.float32) for name in ("x0", "eps")}
    real = np.zeros((len(images), height // PATCH, width // PATCH), np.float32)
    for b, one in enumerate(images):
        h, w = one["x0"].shape[:2]
        real[b, : h // PATCH, : w // PATCH] = 1
        for name, values in batch.items():
            values[b, :, :h, :w] = np.moveaxis(one[name], -1, 0)
    numbers = {name: np.array([one[name] for one in images]) for name in ("step", "class")}
    return batch | numbers | {"real": real.reshape(len(images), -1)}


def jax_side(folder: Path, remat: str, processor_time: bool) -> None:
    prepare(processor_time)
    import dataclasses

    from jax_dit import make_runs

    from sora_jax.convert.dit import read_diffusers
    from sora_jax.data.packing.packs import PackingConfig, PackItem, pack_batch, patchify

    network = read_diffusers(folder)
    config = dataclasses.replace(network.config, remat=remat, dtype="float32")
    packing = PackingConfig(length=LENGTH, slots=SLOTS, text_length=SLOTS, patch=config.patch)
    hosts = []
    for packs in make_images():
        eps_BLP = np.zeros((ROWS, LENGTH, config.patch_values), np.float32)
        times_BR = np.full((ROWS, SLOTS), 0.5, np.float32)
        for b, images in enumerate(packs):
            noise = np.concatenate([patchify(one["eps"][None], config.patch) for one in images])
            eps_BLP[b, : len(noise)] = noise
            times_BR[b, : len(images)] = [(one["step"] + 1) / 1000 for one in images]
        items = [
            [
                PackItem(one["x0"][None], clip_id, np.array([0]), label=one["class"])
                for clip_id, one in enumerate(images, 1)
            ]
            for images in packs
        ]
        hosts.append({"pack": pack_batch(items, packing), "eps_BLP": eps_BLP, "times_BR": times_BR})
    forward, step = make_runs(config, network.params, hosts)
    first = constant(step(0))
    serve(
        {
            "first": first,
            "forward:packed": lambda: sum(forward(i) for i in range(len(hosts))),
            "train:packed": lambda: sum(step(i) for i in range(len(hosts))),
        },
        processor_time,
    )


def flags(options) -> list[str]:
    """What both sides need to know."""
    named = {"--eager-only": options.quick or options.eager_only, "--processor-time": options.processor_time}
    return [f"--remat={options.remat}", *(name for name, on in named.items() if on)]


def constant(value: float):
    return lambda: value


def measure(size: str, rounds: int, flags: list[str]) -> tuple[list[list[str]], str]:
    """Rows of the table and a line on the images; AssertionError where packs and single sizes have other losses."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = f"--size={size}", f"--folder={folder}", *flags
        workers = {"torch": Worker("torch", *arguments)}
        workers["jax"] = Worker("jax", *arguments)
        ours, theirs = (workers[side].ask("first")[1] for side in ("jax", "torch"))
        print(f"{size}: loss of the first update: {ours:.6f} and {theirs:.6f}", flush=True)
        assert abs(ours - theirs) <= TOLERANCE * theirs, f"{size}: loss {ours}, PyTorch {theirs}"
        seconds = alternate(workers, rounds)
        for worker in workers.values():
            worker.close()
    return table_rows(seconds), described()


def table_rows(seconds: dict[str, list[float]]) -> list[list[str]]:
    updates = [[one for pack in packs for one in pack] for packs in make_images()]
    images = sum(len(update) for update in updates)
    calls = {
        "packed": len(updates),
        "padded": sum(-(-len(update) // 8) for update in updates),
        "per": sum(len(equal_sizes(update)) for update in updates),
    }
    rows = []
    for what in ("forward", "train"):
        packed = seconds[f"jax {what}:packed"]
        for layout, side in LAYOUTS.items():
            if taken := seconds.get(f"{side} {what}:{layout}"):
                ratios = np.array(taken) / np.array(packed)
                won = f"**{median(taken) / median(packed):.2f}** ({middle_half(ratios)})" if side == "torch" else ""
                name = {"per-size-eager": "one call per size, eager"}.get(layout, layout.replace("-", ", "))
                values = f"{median(taken):.2f}", f"{images / median(taken):.1f}", won
                rows.append([what, name, str(calls[layout.partition("-")[0]]), *values])
    return rows


def described() -> str:
    packs = [pack for packs in make_images() for pack in packs]
    sizes = [one["x0"].shape[:2] for pack in packs for one in pack]
    tokens = [h * w // PATCH**2 for h, w in sizes]
    fill = sum(tokens) / (len(packs) * LENGTH)
    return (
        f"{len(sizes)} images of {len(set(sizes))} sizes, {min(tokens)} to {max(tokens)} tokens, in mean"
        f" {np.mean(tokens):.0f}; packs {100 * fill:.1f} % full, padded {100 * np.mean(tokens) / LENGTH:.1f} %."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
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
    size, rounds = ("tiny", 2) if options.quick else ("S/2", options.rounds)
    rows, images = measure(size, rounds, flags(options))
    notes = (
        f"DiT-{size}, float32, {conditions(options.processor_time)}. {images} Medians of {rounds} rounds, a"
        f" call of each in turn; in brackets the middle half of the ratios of single rounds. remat {options.remat!r}."
    )
    print(report(HEADER, rows, notes, measured_on))


if __name__ == "__main__":
    main()
