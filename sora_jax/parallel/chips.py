"""Accelerators as their makers describe them: what a program may use of memory, arithmetic and network.

TPUs: the system architecture pages of Cloud TPU (docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e, read November 2026)
for everything but `usable`. Interconnect there is both directions of all ports of a chip together; here a link is one
direction of one port. Data-centre network there is per chip (v5p) or per pod of 256 chips (v5e 6.4 Tbit/s, v6e 25.6
Tbit/s). `usable` is what the compiler of libtpu 0.0.52 leaves to a program of the chip's memory.

GPUs: NVIDIA's data sheets (A100 80GB SXM, H100 SXM, H200 SXM; products without sparsity; NVLink there is both
directions together) and those of DGX A100, H100 and H200 for the network of a node (8 ports of 200 or 400 Gbit/s). What
XLA's compiler wants to know of them is what CUDA's deviceQuery says. `usable` is the three quarters that JAX takes
unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
"""

import dataclasses
from collections.abc import Mapping

GIB = 2**30
GPU_LIMITS = {  # of all of them
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "shared_memory_per_block": 48 * 1024,
}
AMPERE = GPU_LIMITS | {
    "core_count": 108,
    "fpus_per_core": 64,
    "clock_rate_ghz": 1.41,
    "l2_cache_size": 40 * 2**20,
    "shared_memory_per_core": 164 * 1024,
    "shared_memory_per_block_optin": 163 * 1024,
    "cuda_compute_capability": "{ major: 8 }",
}
HOPPER = GPU_LIMITS | {
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "l2_cache_size": 50 * 2**20,
    "shared_memory_per_core": 228 * 1024,
    "shared_memory_per_block_optin": 227 * 1024,
    "cuda_compute_capability": "{ major: 9 feature_extension: ACCELERATED_FEATURES }",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; `peak` in bfloat16 FLOP/s, `memory` in bytes, all bandwidths in bytes per second.

    usable: bytes of `memory` that a program may take. link: one direction of one interconnect port. ports: of a chip,
    two to an axis of a torus, or one to a switch that joins all chips. torus: how many chips in a row close to a ring,
    or a divisor of such numbers; a shorter row is a line. gpu: what XLA's compiler wants to know of a GPU, more than
    this.
    """

    name: str
    peak: float
    memory: int
    usable: int
    memory_bandwidth: float
    link: float
    ports: int
    torus: int
    data_centre: float
    gpu: Mapping[str, object] | None = None

    @property
    def switched(self) -> bool:
        return self.ports == 1

    @property
    def dimensions(self) -> int:
        """How many numbers tell the shape of a slice."""
        return 1 if self.switched else self.ports // 2

    def target_config(self) -> str:
        """What XLA's compiler is told of a GPU, in its own notation (GpuTargetConfigProto)."""
        about = {"device_memory_size": self.memory, "memory_bandwidth": int(self.memory_bandwidth), **self.gpu}
        info = " ".join(f"{name}{'' if str(value).startswith('{') else ':'} {value}" for name, value in about.items())
        return f'gpu_device_info {{ {info} }} platform_name: "CUDA" device_description_str: "{self.name}"'


def _gpu(name: str, peak: float, memory: int, bandwidth: float, link: float, network: float, about: Mapping) -> Chip:
    return Chip(name, peak, memory, memory * 3 // 4, bandwidth, link, 1, 1, network, about)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 16 * GIB, int(15.75 * GIB), 819e9, 400e9 / 8, 4, 16, 6.4e12 / 8 / 256),
        Chip("v5p", 459e12, 95 * GIB, int(95.73 * GIB), 2765e9, 1200e9 / 12, 6, 4, 50e9 / 8),
        Chip("v6e", 918e12, 32 * GIB, int(31.24 * GIB), 1638e9, 800e9 / 8, 4, 16, 25.6e12 / 8 / 256),
        _gpu("a100", 312e12, 85_100_068_864, 2039e9, 600e9 / 2, 200e9 / 8, AMPERE),
        _gpu("h100", 989e12, 84_942_979_072, 3350e9, 900e9 / 2, 400e9 / 8, HOPPER),
        _gpu("h200", 989e12, 151_397_597_184, 4800e9, 900e9 / 2, 400e9 / 8, HOPPER),
    )
}
