"""Ahead-of-time compilation for a named topology of TPUs or GPUs, on a machine that has none.

libtpu holds the compiler for TPUs and knows their topologies, JAX's CUDA plugin that for GPUs; nothing runs and nothing
is allocated. The program is the one that would train: the same functions, traced with abstract arrays that carry their
shardings.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sora_jax.config import check, choose
from sora_jax.errors import UserError
from sora_jax.parallel.chips import CHIPS, Chip
from sora_jax.parallel.mesh import MeshConfig, make_mesh, with_slices
from sora_jax.parallel.rules import MESH_AXES, partition

INSTALL_TPU, INSTALL_GPU = "pip install libtpu", "pip install 'jax[cuda13]'"
EXAMPLES = {"v5e": "4x4", "v5p": "4x4x8", "v6e": "16x16", "a100": "8", "h100": "8", "h200": "8"}
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` equal parts of a pod, each of `shape` chips: 4x4x8 of v5p is 128 chips. One JAX device is one chip.

    A slice of GPUs is what NVLink joins: a node, h100:8.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, name: str, slices: int = 1) -> "Topology":
        """From CHIP:A, CHIP:AxB or CHIP:AxBxC, such as v5p:4x4x8; UserError where there is no such topology."""
        chip, _, text = name.partition(":")
        choose("the chip of --topology", chip, CHIPS)
        dimensions = CHIPS[chip].dimensions
        numbers = f"{dimensions} numbers" if dimensions > 1 else "one number"
        check(
            re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text) is not None and len(text.split("x")) == dimensions,
            f"--topology is {name!r}; after the chip it must have {numbers}, as {chip}:{EXAMPLES[chip]} has",
        )
        check(slices > 0, f"--slices is {slices}; it must be positive")
        return cls(CHIPS[chip], tuple(map(int, text.split("x"))), slices)

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    def devices(self) -> list:
        """Its devices, to compile for; UserError without a compiler, or where it knows no such topology."""
        return self._gpus() if self.chip.gpu else self._tpus()

    def _gpus(self) -> list:
        found = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
        check(found, f"to plan for a GPU its compiler is needed, which is not installed: {INSTALL_GPU}")
        from jax.experimental import topologies

        shape = f"{self.slices}x1x{self.shape[0]}"  # partitions, hosts of one, devices of one
        target = self.chip.target_config()
        return list(topologies.get_topology_desc(platform="cuda", topology=shape, target_config=target).devices)

    def _tpus(self) -> list:
        found = importlib.util.find_spec("libtpu") is not None
        check(found, f"to plan for a TPU its compiler is needed, which is not installed: {INSTALL_TPU}")
        _quiet()
        from jax.experimental import topologies

        more = {"num_slices": self.slices} if self.slices > 1 else {}
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=self.name, **more).devices)
        except jax.errors.JaxRuntimeError as error:
            shown = ", ".join(f"{chip}:{shape}" for chip, shape in EXAMPLES.items() if not CHIPS[chip].gpu)
            said = (str(error).splitlines() or [""])[0][:200]
            raise UserError(
                f"--topology is {self.name!r}; libtpu makes none of that ({said}); some that exist: {shown}"
            ) from error


def _quiet() -> None:
    """Without a TPU libtpu looks for one and complains; with these it does not look. Several processes may plan."""
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
    """The size of each of `MESH_AXES` on a topology; `slice` is the number of slices unless the config gives one."""
    given = with_slices(config, topology.slices)
    sizes = [getattr(given, axis) for axis in MESH_AXES]
    known = math.prod(size for size in sizes if size != -1)
    sizes = [topology.chips // known if size == -1 else size for size in sizes]
    shown = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    check(
        math.prod(sizes) == topology.chips,
        f"config.mesh is {shown}; it does not use exactly the {topology.chips} chips of --topology={topology.name}"
        + (f" --slices={topology.slices}" if topology.slices > 1 else ""),
    )
    check(
        sizes[0] == topology.slices,
        f"config.mesh.slice is {sizes[0]}; it must be the number of slices, {topology.slices}",
    )
    return tuple(sizes)


def topology_mesh(config: MeshConfig, topology: Topology) -> Mesh:
    """The Explicit mesh of a config on a topology, axes laid along the interconnect; slices by the outermost axis."""
    return make_mesh(MeshConfig(*mesh_sizes(config, topology)), topology.devices())


def use(mesh: Mesh | AbstractMesh):
    """Sets a mesh for tracing: of devices, or of shapes alone."""
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh)


def on_mesh(tree, mesh: Mesh | AbstractMesh):
    """Abstract arrays with the shardings they were traced with, on `mesh`; those without one are whole everywhere."""

    def struct(x):
        spec = x.sharding.spec if x.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(struct, tree)


def abstract_batch(tree, mesh: Mesh | AbstractMesh, leading: int = 0):
    """Abstract arrays as `parallel.mesh.place_batch` would place them: split by the axis after the leading ones."""

    def struct(x):
        axes = (*(None,) * leading, "batch", *(None,) * (len(x.shape) - leading - 1))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, partition(*axes)))

    return jax.tree.map(struct, tree)


def bytes_per_device(tree) -> int:
    """Bytes that the shards of abstract arrays with shardings take on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """What the compiler says of a program that does not fit: bytes it would take on a chip, bytes it may."""

    needed: int
    usable: int


def compile_program(function, arguments: tuple, mesh: Mesh) -> "jax.stages.Compiled | OutOfMemory":
    """Compiles a jitted function for the devices of `mesh`, from abstract arguments."""
    with use(mesh):
        lowered = function.lower(*arguments)
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            found = out_of_memory(str(error))
            if found is None:
                raise
            return found


def out_of_memory(message: str) -> OutOfMemory | None:
    """Reads the compiler's complaint; None where it is about something else."""
    said = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message) or re.search(
        r"\(([\d.]+)([KMGT]?)B?\) exceeds available HBM \(([\d.]+)([KMGT]?)", message
    )
    if "RESOURCE_EXHAUSTED" not in message or said is None:
        return None
    needed, unit, usable, usable_unit = said.groups()
    return OutOfMemory(int(float(needed) * UNITS[unit]), int(float(usable) * UNITS[usable_unit]))
