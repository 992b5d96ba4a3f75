"""Time the sampler with the keys and values of captions computed once, and with them computed at every step.

    python experiments/bench/text_keys.py --workdir=runs/quickstart/transformer
    python experiments/bench/text_keys.py --width=256 --depth=8 --text-length=256

The first command takes the weights and prompts of a run; the second an untrained model, with packs of `--length` tokens
and `--text-length` text tokens. Both ways run in turn, and their samples are compared. Times are processor times.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import jax
import numpy as np

from sora_jax.data.feeding.tokenizer import Tokenizer, TokenizerConfig
from sora_jax.data.packing.packs import PackingConfig
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.generate import sampler
from sora_jax.generate.requests import Request
from sora_jax.generate.run import load_run
from sora_jax.models.denoiser import denoiser_specs, encode_condition
from sora_jax.models.text import TextConfig
from sora_jax.models.transformer import TransformerConfig
from sora_jax.nn.params import init
from sora_jax.parallel.mesh import make_mesh
from sora_jax.train.denoiser import DenoiserRun


def untrained(options: argparse.Namespace) -> sampler.TrainedDenoiser:
    """Return a model with random weights, whose packs are full of text."""
    model = TransformerConfig(
        depth=options.depth, width=options.width, heads=options.width // 32, text=TextConfig(width=options.width)
    )
    packing = PackingConfig(length=options.length, slots=1, text_length=options.text_length)
    config = DenoiserRun(
        model=model, packing=packing, tokenizer=TokenizerConfig("bytes", max_tokens=options.text_length)
    )
    params = init(denoiser_specs(model), jax.random.key(0))
    return sampler.TrainedDenoiser(config, params, Tokenizer(config.tokenizer), make_mesh())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="run folder; without it the model is untrained")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--text-length", type=int, default=256)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    if options.workdir:
        model = load_run(options.workdir)
        sampling, size = model.config.sampling, model.latent_size(*model.config.preview.sizes[0])
    else:
        model, sampling = untrained(options), SamplingConfig(steps="10")
        size = (options.length // 16, 8, 8)
    prompt = "a red circle moves left on a plain white background " * 8
    requests = [Request(prompt, size, number + 1, guidance=3.0) for number in range(options.clips)]

    def each_step(params, config, pack):
        return dataclasses.replace(encode_condition(params, config, pack), keys_values=None)

    def timed(once: bool) -> tuple[float, list[np.ndarray]]:
        sampler.encode_condition = encode_condition if once else each_step
        sampler.solve_packs = programs[once]
        begin = time.process_time()
        with jax.set_mesh(model.mesh):
            latents = sampler.sample_latents(model, requests, sampling, 0)
        return time.process_time() - begin, latents

    # Different functions, so that neither way finds the program of the other.
    solve = sampler.solve_packs.__wrapped__
    programs = {
        once: jax.jit(lambda *arguments, once=once: solve(*arguments), static_argnums=(0, 1)) for once in (True, False)
    }
    found = {once: timed(once)[1] for once in (True, False)}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * options.runs):
        seconds[number % 2 == 0].append(timed(number % 2 == 0)[0])
    ratios = np.array(seconds[False]) / np.array(seconds[True])
    once, each = (float(np.median(seconds[way])) for way in (True, False))
    difference = max(float(np.abs(a - b).max()) for a, b in zip(found[True], found[False], strict=True))
    low, high = np.quantile(ratios, [0.25, 0.75])
    print(
        f"once {once:.3f} s, each step {each:.3f} s: {np.median(ratios):.3f} ({low:.3f} to {high:.3f}) times as fast; "
        f"the samples differ by {difference:.1e}"
    )


if __name__ == "__main__":
    main()
