"""Counts compiled programs: arithmetic, traffic and collectives of one device.

XLA's own cost analysis counts the body of a loop once; here everything in a loop counts as often as it runs.
"""

import dataclasses
import functools
import json
import math
import re

import numpy as np

from sora_jax.plan.hlo_text import Computation, Executed, Operation, executed, read, trip_count

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id", "replica-id"}
NO_TRAFFIC = FREE | {"while", "conditional", "call", "after-all", "optimization-barrier", "send", "recv"}
# Products of queries x keys x width in the kernels of JAX's splash attention and of cuDNN, by name or target, which do
# not say what they cost: scores and output; backward, in one kernel, scores, their gradient, and those of queries, keys
# and values (2205.14135).
KERNELS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5, 'Softmax"': 2, 'SoftmaxBackward"': 5}


# ----------------------------------------------------------------------------------------------------------
# Arithmetic
# ----------------------------------------------------------------------------------------------------------


def product_flops(run: Executed) -> float:
    """FLOPs (two per multiply-add) of one execution of a product, a convolution or an attention kernel; else 0."""
    op, where = run.op, run.where
    if op.opcode == "dot":
        left = where.operand(op, 0).shapes[0].dims
        contracted = _numbers(op.attribute("lhs_contracting_dims"))
        return 2.0 * math.prod(op.shapes[0].dims) * math.prod(left[axis] for axis in contracted)
    if op.opcode == "convolution":
        return _convolution_flops(op, *(where.operand(op, i).shapes[0].dims for i in (0, 1)))
    if op.opcode == "custom-call":
        return _kernel_flops(op, where)
    return 0.0


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"-?\d+", text or "")]


def _convolution_flops(op: Operation, left: tuple, right: tuple) -> float:
    """A TPU writes products as convolutions, batches of them with padding and dilation: only real pairs count."""
    inputs, kernel, outputs = re.match(r"(\w+)_(\w+)->(\w+)", op.attribute("dim_labels")).groups()
    out, window = op.shapes[0].dims, _window(op.attribute("window"))
    pairs = math.prod(
        _pairs(
            left[inputs.index(str(n))], right[kernel.index(str(n))], out[outputs.index(str(n))], **_entries(window, n)
        )
        for n in range(len(inputs) - 2)
    )
    groups = int(op.attribute("batch_group_count") or 1)
    return 2.0 * pairs * left[inputs.index("b")] / groups * right[kernel.index("i")] * right[kernel.index("o")]


def _window(text: str | None) -> dict[str, list[str]]:
    return {name: value.split("x") for name, value in re.findall(r"(\w+)=(\S+)", (text or "").strip("{}"))}


def _entries(window: dict, n: int) -> dict:
    number = lambda name, default: int(window[name][n]) if name in window else default  # noqa: E731
    low = int(window["pad"][n].split("_")[0]) if "pad" in window else 0
    names = {"stride": "stride", "lhs_dilate": "spread", "rhs_dilate": "reach"}
    return {"low": low} | {name: number(key, 1) for key, name in names.items()}


@functools.cache
def _pairs(size: int, kernel: int, out: int, low: int, stride: int, spread: int, reach: int) -> int:
    """Pairs of output and kernel positions that meet a value of the input, neither padding nor the gaps between."""
    place = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None] * reach
    return int(((place >= 0) & (place <= (size - 1) * spread) & (place % spread == 0)).sum())


def _kernel_flops(op: Operation, where: Computation) -> float:
    """What a kernel says of itself, or the whole square of scores of an attention kernel."""
    if said := re.search(r'"cost_estimate":(\{[^}]*\})', op.rest):
        return float(json.loads(said[1])["flops"])
    names = f"{op.name} {op.attribute('custom_call_target')}"
    products = next((products for name, products in KERNELS.items() if name in names), 0)
    if not products:
        return 0.0
    operands = [shape for name in op.operands if name in where for shape in where[name].shapes]
    shapes = [shape.dims for shape in operands if "f" in shape.dtype and len(shape.dims) > 2]
    if len(shapes) < 2:
        return 0.0
    queries, keys = shapes[:2]
    scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*(\[.*?\])', op.rest)  # as cuDNN is told
    pairs = math.prod(_numbers(scores[1])) if scores else math.prod(queries[:-1]) * keys[-2]
    return 2.0 * products * pairs * queries[-1]


# ----------------------------------------------------------------------------------------------------------
# Traffic
# ----------------------------------------------------------------------------------------------------------


def traffic(run: Executed, computations: dict[str, Computation]) -> float:
    """Bytes that one execution moves between the chip's main memory and its cores.

    Operands and results that lie in main memory count once; of an array that is only sliced, the slices, of one that is
    updated in place, the update. Custom calls are none, unless they are kernels that compute.
    """
    op = run.op
    if run.fused or op.opcode in NO_TRAFFIC or op.opcode.endswith("-done") or _collective(op.opcode):
        return 0.0
    if op.opcode == "custom-call" and not _kernel_flops(op, run.where):
        return 0.0
    operands = [run.where[name] for name in op.operands if name in run.where]
    inner = computations.get((op.attribute("calls") or "").lstrip("%"))
    if op.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _main(op)
    if op.opcode in ("dynamic-update-slice", "scatter"):
        return 2.0 * _main(operands[1 if op.opcode == "dynamic-update-slice" else -1])
    read_ = sum(_read(inner, index, operand) for index, operand in enumerate(operands))
    return read_ + (_written(inner, op) if inner else _main(op))


def _main(op: Operation) -> float:
    return sum(shape.bytes for shape in op.shapes if shape.main)


def _read(inner: Computation | None, index: int, operand: Operation) -> float:
    whole = _main(operand)
    if not whole or inner is None or index not in inner.parameters:
        return whole
    users = inner.users[inner.parameters[index].name]
    if users and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
        return min(whole, sum(user.bytes for user in users))
    updated = [u for u in users if u.opcode == "dynamic-update-slice" and u.operands[0] == inner.parameters[index].name]
    return 0.0 if users and len(updated) == len(users) else whole


def _written(inner: Computation, op: Operation) -> float:
    root = inner.root
    results = [inner[name] for name in root.operands if name in inner] if root.opcode == "tuple" else [root]
    total = 0.0
    for shape, result in zip(op.shapes, results, strict=False):
        update = inner.operand(result, 1) if result.opcode == "dynamic-update-slice" else None
        total += min(shape.bytes, update.bytes if update else shape.bytes) if shape.main else 0.0
    return total


def _collective(opcode: str) -> str | None:
    """The kind of a collective by its opcode, started asynchronously or not; None for anything else."""
    kind = opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


# ----------------------------------------------------------------------------------------------------------
# Sums
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of one device: kind, groups of devices, `bytes` of its operands, how often it runs, in which loop.

    groups: arrays of device numbers, in the order of the mesh; for a collective-permute, pairs of source and target.
    source: the operation of the program that it comes from. dtype, dims: of the largest array that it makes.
    """

    kind: str
    groups: np.ndarray
    bytes: float
    times: int
    loop: str
    source: str
    dtype: str
    dims: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Counted:
    """Sums over one execution of a module on one device; `unread` loops, whose rounds it does not tell, count once."""

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]
    unread: int


def count(text: str, devices: int) -> Counted:
    """FLOPs of products, bytes of main memory and the collectives of a compiled module of so many devices."""
    _, computations = read(text)
    flops, moved, unread = 0.0, 0.0, 0
    found: dict[tuple, Collective] = {}
    for run in executed(text):
        flops += run.times * product_flops(run)
        moved += run.times * traffic(run, computations)
        unread += run.op.opcode == "while" and trip_count(computations, run.where, run.op) is None
        if kind := _collective(run.op.opcode) or between_slices(run.op):
            one = _describe(run, kind, devices)
            # TPUs write an asynchronous one into the fusions where it starts, where it runs beside others and where
            # it ends. Elsewhere the channel tells nothing: all that `shard_map` makes have the same.
            written = (run.op.attribute("channel_id"), one.dims, one.source) if run.fused else run.op.name
            found.setdefault((run.loop, kind, written), one)
    return Counted(flops, moved, tuple(found.values()), unread)


def _describe(run: Executed, kind: str, devices: int) -> Collective:
    op = run.op
    operands = [shape for name in op.operands if name in run.where for shape in run.where[name].shapes]
    size = sum(shape.bytes for shape in operands)
    scattered = "all-reduce-scatter" in run.caller  # a reduce-scatter, as TPUs write it
    source = re.search(r'op_name="([^"]*)"', op.rest)
    largest = max(op.shapes, key=lambda shape: shape.bytes)
    return Collective(
        "reduce-scatter" if kind == "all-reduce" and scattered else kind,
        groups(op, devices),
        size,
        run.times,
        run.loop,
        source[1] if source else "",
        largest.dtype,
        largest.dims,
    )


def between_slices(op: Operation) -> str | None:
    """The kind of a collective that the runtime does between slices: the program only hands it what a chip sends."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.rest) if op.opcode == "send" else None
    return kind and kind[1].lower().replace("_", "-")


def groups(op: Operation, devices: int) -> np.ndarray:
    """Device numbers (groups, members) that exchange data; (pairs, 2) of a collective-permute."""
    if op.opcode == "send":  # slices x chips of a slice, such as {1,2}x{0:3}; a chip to its like in the others
        named = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', op.rest)[1]
        first, _, last = named.partition(":")
        slices = int(last) - int(first) + 1 if last else len(named.split(","))
        return np.arange(devices).reshape(slices, -1).T
    if pairs := re.search(r"source_target_pairs=\{((?:\{[\d,]*\},?)*)\}", op.rest):
        return np.array([_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])])
    text = re.search(r"replica_groups=(mesh\[.*?\{[^}]*\}|\{\{.*?\}\}|\{\}|\[[^\s]*)", op.rest)
    if text is None or text[1] == "{}":
        if text is None and "replica_groups=" in op.rest:
            raise ValueError(f"groups of devices in a notation that is not known: {op.rest}")
        return np.arange(devices)[None]
    if text[1].startswith("mesh"):
        return _named_groups(text[1])
    if text[1].startswith("{"):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", text[1])])
    return _permuted(text[1].partition("<=")[2]).reshape(_numbers(re.match(r"\[([\d,]+)\]", text[1])[1]))


def _permuted(text: str) -> np.ndarray:
    """[2,4]T(1,0): the numbers from 0 on in that shape, its axes in another order."""
    dims, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return numbers.transpose(_numbers(order)) if order else numbers


def _named_groups(text: str) -> np.ndarray:
    """mesh['axis_0'=4,'axis_1'=2] {'axis_0'}: devices that differ along the named axes alone.

    mesh[...], device_ids=([2,4]T(1,0)) {...} has the devices in another order.
    """
    mesh, ids, named = re.match(r"mesh\[([^\]]*)\](?:,\s*device_ids=\(([^\s]*)\))?\s*\{([^}]*)\}", text).groups()
    axes = dict((name, int(size)) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", mesh))
    chosen = [name for name in re.findall(r"[\w.]+", named) if name in axes]
    sizes = tuple(axes.values())
    numbers = (_permuted(ids) if ids else np.arange(math.prod(sizes))).reshape(sizes)
    order = [i for i, name in enumerate(axes) if name not in chosen] + [list(axes).index(name) for name in chosen]
    return numbers.transpose(order).reshape(-1, math.prod(axes[name] for name in chosen))
