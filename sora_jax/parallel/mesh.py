"""Make the device mesh of a config, and place arrays on it."""

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from sora_jax.config import check
from sora_jax.errors import UserError
from sora_jax.parallel.rules import MESH_AXES, RULES, AnyMesh, partition, parts
from sora_jax.shapes import PyTree


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. Their product is the number of devices; one size may be -1 and is inferred from it."""

    slice: int = 1  # slices of a TPU pod, between which only gradients travel; 1: as many as there are
    data: int = -1  # data parallelism: splits the batch
    fsdp: int = 1  # splits the batch, and parameters and optimizer state
    sequence: int = 1  # splits the tokens of a pack, or the rows of pixels of a clip
    tensor: int = 1  # tensor parallelism: splits heads and hidden units

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            check(size > 0 or size == -1, f"mesh.{name} is {size}; it must be positive, or -1 to be inferred")
        inferred = [name for name, size in sizes.items() if size == -1]
        check(len(inferred) < 2, f"mesh.{' and mesh.'.join(inferred)} are -1; only one size can be inferred")


def make_mesh(config: MeshConfig = MeshConfig(), devices: list | None = None) -> Mesh:
    """Make a mesh with all of `MESH_AXES`, of type Explicit: a wrong sharding is an error at trace time.

    Neighbours in the mesh are neighbours on the interconnect. With several TPU slices only the axis `slice` uses the
    network between them; its size is their number unless the config gives one.

    Raises:
        UserError: the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(with_slices(config, _slices(devices)), axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    shown = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    check(math.prod(sizes) == len(devices), f"mesh is {shown}; it must use exactly the {len(devices)} devices")
    return Mesh(_laid_out(sizes, devices), MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def mesh_here(config: MeshConfig) -> Mesh:
    """Make a run's own mesh, or one that splits the batch where this machine has another number of devices."""
    try:
        return make_mesh(config)
    except UserError:
        return make_mesh()


def with_slices(config: MeshConfig, slices: int) -> MeshConfig:
    """Return the config with the given number of slices, unless it sets its own."""
    return dataclasses.replace(config, slice=slices) if config.slice == 1 else config


def _slices(devices: list) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


def _laid_out(sizes: list[int], devices: list) -> np.ndarray:
    """Arrange the devices in an array of these sizes, neighbours on the interconnect beside each other."""
    slices = _slices(devices)
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    check(sizes[0] == slices, f"mesh.slice is {sizes[0]}; it must be the number of slices, {slices}")
    inside = (1, *sizes[1:])
    across = (slices, *(1 for _ in sizes[1:]))
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def check_split(mesh: AnyMesh, axis: str, size: int, option: str) -> None:
    """Raise UserError, naming the option, unless the mesh splits a logical axis of this size evenly."""
    if size % parts(axis, mesh):
        wide = " x ".join(f"{name}={mesh.shape[name]}" for name in RULES[axis] if mesh.shape[name] > 1)
        raise UserError(f"{option} is {size}; with a mesh of {wide} it must be a multiple of {parts(axis, mesh)}")


def place_batch(tree: PyTree, mesh: Mesh, leading: int = 0) -> PyTree:
    """Assemble a global batch, sharded over the mesh, from the rows that this process holds as host arrays.

    `leading` is the number of axes before the batch axis (micro-batches), which are not split.
    """

    def place(x: jax.typing.ArrayLike) -> jax.Array:
        x = np.asarray(x)
        axes = (*(None,) * leading, "batch", *(None,) * (x.ndim - leading - 1))
        return jax.make_array_from_process_local_data(NamedSharding(mesh, partition(*axes)), x)

    return jax.tree.map(place, tree)
