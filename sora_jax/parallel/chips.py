"""Describe accelerators by their makers' data sheets: arithmetic, memory and network.

TPUs: the system architecture pages of Cloud TPU (docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e, read November 2026),
except `usable`. Interconnect bandwidth there is the sum over both directions of all ports of a chip; here a link is one
direction of one port. Data-centre bandwidth there is per chip (v5p) or per pod of 256 chips (v5e 6.4 Tbit/s, v6e 25.6
Tbit/s). `usable` is the memory that the compiler of libtpu 0.0.52 allows a program.

GPUs: NVIDIA's data sheets (A100 80GB SXM, H100 SXM, H200 SXM; FLOP/s without sparsity; NVLink there is the sum of both
directions) and those of DGX A100, H100 and H200 for the network of a node (8 ports of 200 or 400 Gbit/s). The device
description for XLA's compiler is the output of CUDA's deviceQuery. `usable` is the three quarters of memory that JAX
preallocates unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

GIB = 2**30
GPU_LIMITS = {  # shared by all generations
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
    """Describe one chip. Bandwidths are in bytes per second."""

    name: str
    peak: float  # FLOP/s in bfloat16
    memory: int  # bytes
    usable: int  # bytes of `memory` that a program may allocate
    memory_bandwidth: float
    link: float  # bandwidth of one direction of one interconnect port
    ports: int  # interconnect ports: two per axis of a torus, or one to a switch that joins all chips
    torus: int  # a row of chips closes to a ring if its length is a multiple of this; other rows are lines
    data_centre: float  # bandwidth of the data-centre network
    gpu: Mapping[str, object] | None = None  # further fields of XLA's description of a GPU; None for a TPU

    @property
    def switched(self) -> bool:
        """Return True if a switch joins all chips of a slice."""
        return self.ports == 1

    @property
    def dimensions(self) -> int:
        """Return the number of dimensions of a slice's shape."""
        return 1 if self.switched else self.ports // 2

    def target_config(self) -> str:
        """Return the description of a GPU for XLA's compiler, in its text format (GpuTargetConfigProto)."""
        sizes = {"device_memory_size": self.memory, "memory_bandwidth": int(self.memory_bandwidth)}
        fields = sizes | dict(self.gpu or {})
        info = " ".join(f"{name}{'' if str(value).startswith('{') else ':'} {value}" for name, value in fields.items())
        return f'gpu_device_info {{ {info} }} platform_name: "CUDA" device_description_str: "{self.name}"'


def _gpu(name: str, memory: int, **about: Any) -> Chip:
    """Return a GPU: a slice is the node that NVLink's switch joins."""
    return Chip(name, memory=memory, usable=memory * 3 // 4, ports=1, torus=1, **about)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v5e",
            peak=197e12,
            memory=16 * GIB,
            usable=int(15.75 * GIB),
            memory_bandwidth=819e9,
            link=400e9 / 8,
            ports=4,
            torus=16,
            data_centre=6.4e12 / 8 / 256,
        ),
        Chip(
            "v5p",
            peak=459e12,
            memory=95 * GIB,
            usable=int(95.73 * GIB),
            memory_bandwidth=2765e9,
            link=1200e9 / 12,
            ports=6,
            torus=4,
            data_centre=50e9 / 8,
        ),
        Chip(
            "v6e",
            peak=918e12,
            memory=32 * GIB,
            usable=int(31.24 * GIB),
            memory_bandwidth=1638e9,
            link=800e9 / 8,
            ports=4,
            torus=16,
            data_centre=25.6e12 / 8 / 256,
        ),
        _gpu(
            "a100",
            peak=312e12,
            memory=85_100_068_864,
            memory_bandwidth=2039e9,
            link=600e9 / 2,
            data_centre=200e9 / 8,
            gpu=AMPERE,
        ),
        _gpu(
            "h100",
            peak=989e12,
            memory=84_942_979_072,
            memory_bandwidth=3350e9,
            link=900e9 / 2,
            data_centre=400e9 / 8,
            gpu=HOPPER,
        ),
        _gpu(
            "h200",
            peak=989e12,
            memory=151_397_597_184,
            memory_bandwidth=4800e9,
            link=900e9 / 2,
            data_centre=400e9 / 8,
            gpu=HOPPER,
        ),
    )
}
