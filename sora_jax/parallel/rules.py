"""Map logical axes to mesh axes: the one file that decides how arrays are laid out over devices.

Every array of the package names its axes logically ("batch", "embed", "heads"...); this file alone turns the names
into a `PartitionSpec`. All mesh axes always exist, with size 1 when unused, so the same rules serve every machine.
"""

import math

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

AnyMesh = Mesh | AbstractMesh  # of devices, or of shapes alone
SLICE, DATA, FSDP, SEQUENCE, TENSOR = MESH_AXES = ("slice", "data", "fsdp", "sequence", "tensor")

# The batch is split in the same way by all models.
SHARED: dict[str, tuple[str, ...]] = {"batch": (SLICE, DATA, FSDP)}

# Packed sequences: parameters and their gradients over fsdp, heads and hidden units over tensor, tokens over sequence.
TRANSFORMER: dict[str, tuple[str, ...]] = {
    # activations
    "length": (SEQUENCE,),
    "keys": (),  # keys and values that are gathered along the sequence
    "width": (),
    # parameters; "heads" and "hidden" also name activations
    "layers": (),
    "embed": (FSDP,),
    "heads": (TENSOR,),
    "hidden": (TENSOR,),
    "head": (),
    "vocabulary": (),
}

# Convolutions: clips are split by rows of pixels over the axis that splits one clip; the few parameters are whole.
AUTOENCODER: dict[str, tuple[str, ...]] = {
    # activations
    "time": (),
    "height": (SEQUENCE,),
    "breadth": (),
    "picture": (),  # height and width of the image autoencoder, whose attention and norms see all of a picture
    # parameters; "channels" also names activations
    "kernel": (),
    "conv_in": (),
    "conv_out": (),
    "channels": (),
}

RULES = SHARED | TRANSFORMER | AUTOENCODER


def partition(*axes: str | None) -> PartitionSpec:
    """Return the `PartitionSpec` of an array with these logical axes; None is an axis that is never split.

    Raises:
        ValueError: a name is unknown, or two axes of one array map to the same mesh axis.
    """
    owners: dict[str, str | None] = {}
    entries = []
    for name in axes:
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(RULES)}")
        mesh_axes = RULES[name] if name else ()
        for mesh_axis in mesh_axes:
            if mesh_axis in owners:
                raise ValueError(f"axes {owners[mesh_axis]!r} and {name!r} both map to mesh axis {mesh_axis!r}")
            owners[mesh_axis] = name
        entries.append(mesh_axes if len(mesh_axes) != 1 else mesh_axes[0])
    return PartitionSpec(*(entry or None for entry in entries))


def on_mesh() -> bool:
    """Return True if a mesh is set; the model's functions also run without one, and inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not (mesh.empty or mesh.are_all_axes_manual)


def platform() -> str:
    """Return the platform that is traced for: that of the mesh, which may be a description, else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def parts(name: str, mesh: AnyMesh | None = None) -> int:
    """Return the number of shards of a logical axis on `mesh`, or on the mesh that is set; 1 without a mesh."""
    shape = (mesh or jax.sharding.get_abstract_mesh()).shape
    return math.prod(shape.get(axis, 1) for axis in RULES[name])


def one_device() -> bool:
    """Return True if no mesh is set, or one of a single device."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.values()) == 1


def out_sharding(*axes: str | None) -> PartitionSpec | None:
    """Return `partition(*axes)` for an `out_sharding=` argument, or None if no mesh is set."""
    return partition(*axes) if on_mesh() else None


def reshard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Reshard `x` by its logical axes; return it unchanged if no mesh is set."""
    return jax.reshard(x, partition(*axes)) if on_mesh() else x


def layout_of(x: jax.Array) -> PartitionSpec | None:
    """Return the sharding of `x` for an `out_sharding=` argument, or None if no mesh is set."""
    return jax.typeof(x).sharding.spec if on_mesh() else None


def laid_out_as(x: jax.Array, other: jax.Array) -> jax.Array:
    """Reshard `x` like `other`; return it unchanged if no mesh is set."""
    return jax.reshard(x, layout_of(other)) if on_mesh() else x
