"""Compile ahead of time for a named topology of TPUs or GPUs, on a machine that has none.

libtpu contains the compiler for TPUs and their topologies, JAX's CUDA plugin that for GPUs. Nothing runs and nothing is
allocated. The program is the one that would train: the same functions, traced with abstract arrays that carry their
shardings.
"""

import dataclasses
import importlib.util
import math
import os
import re
from contextlib import AbstractContextManager

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sora_jax.config import check, choose
from sora_jax.errors import UserError
from sora_jax.parallel.chips import CHIPS, Chip
from sora_jax.parallel.mesh import MeshConfig, make_mesh, with_slices
from sora_jax.parallel.rules import MESH_AXES, AnyMesh, partition
from sora_jax.shapes import PyTree

INSTALL_TPU = "pip install libtpu"
INSTALL_GPU = "pip install 'jax[cuda13]'"
EXAMPLES = {"v5e": "4x4", "v5p": "4x4x8", "v6e": "16x16", "a100": "8", "h100": "8", "h200": "8"}  # of a slice's shape
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Describe a set of equal slices of a pod. One JAX device is one chip.

    A slice is the chips that the interconnect joins: v5p:4x4x8 has 128 chips, h100:8 is a node of GPUs under NVLink.
    """

    chip: Chip
    shape: tuple[int, ...]  # chips of a slice along each axis of its torus
    slices: int = 1  # number of slices, joined by the data-centre network

    @classmethod
    def parse(cls, name: str, slices: int = 1) -> "Topology":
        """Parse CHIP:A, CHIP:AxB or CHIP:AxBxC, such as v5p:4x4x8; UserError if it is malformed."""
        chip, _, text = name.partition(":")
        choose("the chip of --topology", chip, CHIPS)
        dimensions = CHIPS[chip].dimensions
        numbers = f"{dimensions} numbers" if dimensions > 1 else "one number"
        check(
            re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text) is not None and len(text.split("x")) == dimensions,
            f"--topology is {name!r}; it must have {numbers} after the chip, such as {chip}:{EXAMPLES[chip]}",
        )
        check(slices > 0, f"--slices is {slices}; it must be positive")
        return cls(CHIPS[chip], tuple(map(int, text.split("x"))), slices)

    @property
    def name(self) -> str:
        """Return the name of a slice as `parse` reads it, which is also libtpu's."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Return the number of chips of all slices."""
        return self.slices * math.prod(self.shape)

    def devices(self) -> list:
        """Return device descriptions to compile for.

        Raises:
            UserError: the compiler is not installed, or it knows no such topology.
        """
        return self._gpus() if self.chip.gpu else self._tpus()

    def _gpus(self) -> list:
        found = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
        check(found, f"to plan for a GPU its compiler must be installed: {INSTALL_GPU}")
        from jax.experimental import topologies

        shape = f"{self.slices}x1x{self.shape[0]}"  # partitions, hosts per partition, devices per host
        target = self.chip.target_config()
        return list(topologies.get_topology_desc(platform="cuda", topology=shape, target_config=target).devices)

    def _tpus(self) -> list:
        found = importlib.util.find_spec("libtpu") is not None
        check(found, f"to plan for a TPU its compiler must be installed: {INSTALL_TPU}")
        _quiet()
        from jax.experimental import topologies

        more = {"num_slices": self.slices} if self.slices > 1 else {}
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=self.name, **more).devices)
        except jax.errors.JaxRuntimeError as error:
            shown = ", ".join(f"{chip}:{shape}" for chip, shape in EXAMPLES.items() if not CHIPS[chip].gpu)
            said = (str(error).splitlines() or [""])[0][:200]
            raise UserError(
                f"--topology is {self.name!r}; it must be one that libtpu knows ({said}), such as {shown}"
            ) from error


def _quiet() -> None:
    """Set libtpu's environment variables for a machine without TPUs, unless they are set.

    Otherwise libtpu searches for TPUs, logs errors, and locks out other processes that compile at the same time.
    """
    for name, value in {
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)


def mesh_sizes(config: MeshConfig, topology: Topology) -> tuple[int, ...]:
    """Return the size of each of `MESH_AXES` on a topology; UserError if they do not fit it.

    The axis `slice` has the number of slices unless the config gives one.
    """
    given = with_slices(config, topology.slices)
    sizes = [getattr(given, axis) for axis in MESH_AXES]
    known = math.prod(size for size in sizes if size != -1)
    sizes = [topology.chips // known if size == -1 else size for size in sizes]
    shown = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    check(
        math.prod(sizes) == topology.chips,
        f"config.mesh is {shown}; it must use exactly the {topology.chips} chips of --topology={topology.name}"
        + (f" --slices={topology.slices}" if topology.slices > 1 else ""),
    )
    check(
        sizes[0] == topology.slices,
        f"config.mesh.slice is {sizes[0]}; it must be the number of slices, {topology.slices}",
    )
    return tuple(sizes)


def topology_mesh(config: MeshConfig, topology: Topology) -> Mesh:
    """Return the Explicit mesh of a config on a topology, with axes along the interconnect and slices outermost."""
    return make_mesh(MeshConfig(*mesh_sizes(config, topology)), topology.devices())


def use_mesh(mesh: AnyMesh) -> AbstractContextManager:
    """Set a mesh, of devices or of shapes alone, for tracing inside the context."""
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh)


def abstract_on_mesh(tree: PyTree, mesh: AnyMesh) -> PyTree:
    """Move abstract arrays to `mesh` with the partition specs of their trace; those without one are replicated."""

    def struct(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(struct, tree)


def abstract_batch(tree: PyTree, mesh: AnyMesh, leading: int = 0) -> PyTree:
    """Shard abstract arrays as `parallel.mesh.place_batch` places real ones: along the axis after the leading ones."""

    def struct(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = (*(None,) * leading, "batch", *(None,) * (len(x.shape) - leading - 1))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, partition(*axes)))

    return jax.tree.map(struct, tree)


def bytes_per_device(tree: PyTree) -> int:
    """Return the bytes on one device of abstract arrays that carry shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """Report a program that the compiler refuses because it exceeds a chip's memory."""

    needed: int  # bytes that the program would allocate on a chip
    usable: int  # bytes that it may


def compile_program(function: jax.stages.Wrapped, arguments: tuple, mesh: Mesh) -> jax.stages.Compiled | OutOfMemory:
    """Compile a jitted function for the devices of `mesh`, from abstract arguments."""
    with use_mesh(mesh):
        lowered = function.lower(*arguments)
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            found = out_of_memory(str(error))
            if found is None:
                raise
            return found


def out_of_memory(message: str) -> OutOfMemory | None:
    """Parse the compiler's error message; return None if it is not about memory."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message) or re.search(
        r"\(([\d.]+)([KMGT]?)B?\) exceeds available HBM \(([\d.]+)([KMGT]?)", message
    )
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    needed, unit, usable, usable_unit = found.groups()
    return OutOfMemory(int(float(needed) * UNITS[unit]), int(float(usable) * UNITS[usable_unit]))
