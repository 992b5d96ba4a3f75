"""Estimate the time of collectives inside a slice and between slices from bandwidths, without latencies.

A group of n chips along rings moves, of the b bytes that a chip holds after a gather or before a scatter,

    all-gather, reduce-scatter    b (n - 1) / n        (1)
    all-reduce                  2 b (n - 1) / n        (2)
    all-to-all                    b n / 4, at most     (3)

through a chip's links along the physical axes that the group spans: in both directions if an axis closes to a ring, in
one if it is a line. A collective-permute moves b through one link. (Chan et al. 2007, Collective communication; for
(3) a ring's links carry b n / 8 in each direction.) A group over several slices communicates inside each slice first,
so that between slices a chip moves only its share.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

from sora_jax.parallel.chips import Chip
from sora_jax.parallel.rules import MESH_AXES, SLICE
from sora_jax.plan.hlo import Collective


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Sum all collectives of one kind over the same mesh axes."""

    kind: str
    axes: tuple[str, ...]
    runs: int  # executions
    bytes: float  # that they hold on a chip: b of the equations
    seconds: float  # on the interconnect
    between: float  # seconds in the data-centre network, between slices


def axes_of(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """Return the mesh axes along which the members of a group differ."""
    coords = np.stack(np.unravel_index(groups, tuple(mesh.shape[axis] for axis in MESH_AXES)), -1)
    differ = (coords != coords[:, :1]).any((0, 1))
    return tuple(axis for axis, moves in zip(MESH_AXES, differ, strict=True) if moves)


def links(axes: Iterable[str], mesh: Mesh, chip: Chip) -> int:
    """Count the links of a chip (one direction of a port each) that a group over these mesh axes uses in its slice."""
    if chip.switched:
        return 1
    index = tuple(slice(None) if axis in axes and axis != SLICE else 0 for axis in MESH_AXES)
    coords = np.array([device.coords for device in np.atleast_1d(mesh.devices[index]).flat])
    extents = [len(set(coords[:, axis])) for axis in range(coords.shape[1])]
    return sum(2 if extent % chip.torus == 0 else 1 for extent in extents if extent > 1)


def held(collective: Collective, members: int) -> float:
    """Return b of the equations, the largest buffer of a chip: the operand of an all-gather is only a share of it."""
    return collective.bytes * (members if collective.kind == "all-gather" else 1)


def seconds(collective: Collective, axes: tuple[str, ...], mesh: Mesh, chip: Chip) -> tuple[float, float]:
    """Return the seconds of one execution on the interconnect, and between slices."""
    members = collective.groups.shape[1]
    slices = mesh.shape[SLICE] if SLICE in axes else 1
    inside = members // slices
    size = held(collective, members)
    if collective.kind == "collective-permute":
        return (0.0, size / chip.data_centre) if slices > 1 else (size / chip.link, 0.0)
    width = chip.link * max(links(axes, mesh, chip), 1)
    share = size / inside if collective.kind != "all-to-all" else size
    return (
        _moved(collective.kind, size, inside, chip.switched) / width,
        _moved(collective.kind, share, slices, switched=True) / chip.data_centre,
    )


def _moved(kind: str, size: float, members: int, switched: bool) -> float:
    """Return the bytes through a chip's links by equations (1) to (3); if a switch joins all chips, (3) equals (1)."""
    if members < 2:
        return 0.0
    share = size * (members - 1) / members
    if kind == "all-to-all":
        return share if switched else size * members / 4
    return 2 * share if kind == "all-reduce" else share


def summed(collectives: Iterable[Collective], mesh: Mesh, chip: Chip) -> list[Traffic]:
    """Sum collectives by kind and mesh axes; those that take longest come first."""
    sums: dict[tuple, Counter[str]] = {}
    for collective in collectives:
        axes = axes_of(collective.groups, mesh)
        if not axes:
            continue
        inside, between = seconds(collective, axes, mesh, chip)
        size = held(collective, collective.groups.shape[1])
        row = sums.setdefault((collective.kind, axes), Counter())
        row.update({"runs": collective.times, "bytes": collective.times * size})
        row.update({"seconds": collective.times * inside, "between": collective.times * between})
    rows = [
        Traffic(kind, axes, row["runs"], row["bytes"], row["seconds"], row["between"])
        for (kind, axes), row in sums.items()
    ]
    return sorted(rows, key=lambda row: -(row.seconds + row.between))
