"""The device mesh from a config, and arrays placed on it."""

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from sora_jax.errors import UserError
from sora_jax.parallel.rules import MESH_AXES, RULES, partition, parts


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Size of each mesh axis; -1 (at most once) takes what the others leave of the devices."""

    slice: int = 1
    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(f"mesh sizes must be positive, with at most one -1; got {dataclasses.asdict(self)}")


def make_mesh(config: MeshConfig = MeshConfig(), devices: list | None = None) -> Mesh:
    """A mesh with all of `MESH_AXES`, Explicit: a wrong sharding is an error when the program is traced.

    Neighbours in the mesh are neighbours on the interconnect; over several slices of TPUs only the axis `slice`
    uses the network between them, and is their number unless the config gives one. UserError where the sizes do not
    fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(with_slices(config, _slices(devices)), axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        asked = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise UserError(f"mesh {asked} does not use exactly the {len(devices)} devices of this machine")
    return Mesh(_laid_out(sizes, devices), MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def with_slices(config: MeshConfig, slices: int) -> MeshConfig:
    """The config with the number of slices that there are, unless it gives one."""
    return dataclasses.replace(config, slice=slices) if config.slice == 1 else config


def _slices(devices: list) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


def _laid_out(sizes: list[int], devices: list) -> np.ndarray:
    """The devices as an array of these sizes."""
    slices = _slices(devices)
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] != slices:
        raise UserError(f"mesh.slice is {sizes[0]}; it must be the number of slices, {slices}")
    inside, across = (1, *sizes[1:]), (slices, *(1 for _ in sizes[1:]))
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def check_split(mesh: Mesh, axis: str, size: int, option: str) -> None:
    """Raises UserError unless `size` entries of a logical axis can be split over the mesh."""
    if size % parts(axis, mesh):
        wide = " x ".join(f"{name}={mesh.shape[name]}" for name in RULES[axis] if mesh.shape[name] > 1)
        raise UserError(f"{option} is {size}; with a mesh of {wide} it must be a multiple of {parts(axis, mesh)}")


def place_batch(tree, mesh: Mesh, leading: int = 0):
    """Host arrays, this process's share of a global batch, as arrays split over the mesh by their batch axis.

    `leading` axes (micro-batches) stand before the batch axis and are not split.
    """

    def place(x):
        x = np.asarray(x)
        axes = (*(None,) * leading, "batch", *(None,) * (x.ndim - leading - 1))
        return jax.make_array_from_process_local_data(NamedSharding(mesh, partition(*axes)), x)

    return jax.tree.map(place, tree)
