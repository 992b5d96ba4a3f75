"""TPU chips as their makers describe them: what a program may use of memory, arithmetic and network.

Sources: the system architecture pages of Cloud TPU (docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e, read November
2026) for everything but `usable`. Interconnect there is both directions of all ports of a chip together; here a link
is one direction of one port. Data-centre network there is per chip (v5p) or per pod of 256 chips (v5e 6.4 Tbit/s,
v6e 25.6 Tbit/s). `usable` is what the compiler of libtpu 0.0.52 leaves to a program of the chip's memory.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; `peak` in bfloat16 FLOP/s, `memory` in bytes, all bandwidths in bytes per second.

    usable: bytes of `memory` that a program may take. link: one direction of one interconnect port. torus: how many
    chips in a row close to a ring, or a divisor of such numbers; a shorter row is a line. ports: of a chip, two to an
    axis.
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


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 16 * GIB, int(15.75 * GIB), 819e9, 400e9 / 8, 4, 16, 6.4e12 / 8 / 256),
        Chip("v5p", 459e12, 95 * GIB, int(95.73 * GIB), 2765e9, 1200e9 / 12, 6, 4, 50e9 / 8),
        Chip("v6e", 918e12, 32 * GIB, int(31.24 * GIB), 1638e9, 800e9 / 8, 4, 16, 25.6e12 / 8 / 256),
    )
}
