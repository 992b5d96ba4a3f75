"""Measure one FVD several times: other batches, other numbers of devices, once more; and under other protocols.

    python experiments/frechet/invariance.py --clips=24

The clips are drawn: 16 frames of the embedded world against others of it with half of the colours. Needs the extra
`fvd`. Eight virtual devices share the cores of this machine.
"""

import argparse
import dataclasses
import time

import jax

from sora_jax.evaluate.frechet_report import FrechetOptions, frechet_report
from sora_jax.evaluate.i3d import PROTOCOLS
from sora_jax.parallel.mesh import make_mesh
from sora_jax.parallel.settings import prepare_jax
from sora_jax.worlds import HELD_OUT, WorldConfig, clip

WORLD = WorldConfig(sizes=((48, 64),), frames=(16,), image_share=0.0)
CASES = ((1, 8), (1, 8), (1, 1), (1, 5), (8, 8), (8, 16))  # devices and batch; the first is the reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24, help="of each set")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    prepare_jax()
    half = dataclasses.replace(WORLD, colours=WORLD.colours[::2])
    real, made = (
        [clip(world, first + i)[0] for i in range(options.clips)] for world, first in ((WORLD, 0), (half, HELD_OUT))
    )
    reference = None
    for devices, batch in CASES:
        start = time.perf_counter()
        with jax.set_mesh(make_mesh(devices=jax.devices()[:devices])):
            report = frechet_report("fvd", real, made, FrechetOptions(batch=batch))
        seconds = time.perf_counter() - start
        reference = reference or report.value
        off = abs(report.value / reference - 1)
        print(
            f"{devices} devices, batch {batch:2}: FVD {report.value:.6f}, off by {off:.1e}; {seconds:.0f} s",
            flush=True,
        )
    for name, protocol in PROTOCOLS.items():
        print(f"{name:10} {frechet_report('fvd', real, made, FrechetOptions(fvd=protocol)).text}", flush=True)


if __name__ == "__main__":
    main()
