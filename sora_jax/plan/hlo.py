"""Count the arithmetic, memory traffic and collectives of a compiled program on one device.

XLA's own cost analysis counts the body of a loop once; here every operation of a loop counts as often as it runs.
"""

import dataclasses
import functools
import json
import math
import re
from typing import NamedTuple

import numpy as np

from sora_jax.plan.hlo_text import Computation, Executed, Operation, executed, read, trip_count

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id", "replica-id"}
NO_TRAFFIC = FREE | {"while", "conditional", "call", "after-all", "optimization-barrier", "send", "recv"}
# Products of queries x keys x width in the kernels of JAX's splash attention and of cuDNN, by name or target, as the
# program does not state their cost. Forward: scores and output. Backward, in one kernel: scores, their gradient, and
# the gradients of queries, keys and values (2205.14135).
KERNELS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5, 'Softmax"': 2, 'SoftmaxBackward"': 5}


# ----------------------------------------------------------------------------------------------------------
# Arithmetic
# ----------------------------------------------------------------------------------------------------------


def product_flops(run: Executed) -> float:
    """Return the FLOPs (two per multiply-add) of one matrix product, convolution or attention kernel; else 0."""
    op, where = run.op, run.where
    if op.opcode == "dot":
        left = _operand_dims(op, where, 0)
        contracted = _numbers(op.attribute("lhs_contracting_dims"))
        return 2.0 * math.prod(op.shapes[0].dims) * math.prod(left[axis] for axis in contracted)
    if op.opcode == "convolution":
        return _convolution_flops(op, _operand_dims(op, where, 0), _operand_dims(op, where, 1))
    if op.opcode == "custom-call":
        return _kernel_flops(op, where)
    return 0.0


def _operand_dims(op: Operation, where: Computation, index: int) -> tuple[int, ...]:
    return where[op.operands[index]].shapes[0].dims


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"-?\d+", text or "")]


def _groups(pattern: str, text: str | None) -> tuple[str, ...]:
    """Return the groups of a pattern that the text must match."""
    found = re.match(pattern, text or "")
    if found is None:
        raise ValueError(f"unknown notation in HLO: {text}")
    return found.groups()


def _convolution_flops(op: Operation, left: tuple, right: tuple) -> float:
    """Return the FLOPs of a convolution, without those on padding and on the gaps of dilation.

    TPUs write matrix products as convolutions, and batches of products with padding and dilation, so most pairs of
    output and kernel positions of such a convolution are not computed.
    """
    inputs, kernel, outputs = _groups(r"(\w+)_(\w+)->(\w+)", op.attribute("dim_labels"))
    out, window = op.shapes[0].dims, _window(op.attribute("window"))
    pairs = math.prod(
        _pairs(left[inputs.index(n)], right[kernel.index(n)], out[outputs.index(n)], _window_along(window, int(n)))
        for n in map(str, range(len(inputs) - 2))
    )
    groups = int(op.attribute("batch_group_count") or 1)
    return 2.0 * pairs * left[inputs.index("b")] / groups * right[kernel.index("i")] * right[kernel.index("o")]


def _window(text: str | None) -> dict[str, list[str]]:
    """Parse the attribute `window`: name -> value along each axis."""
    return {name: value.split("x") for name, value in re.findall(r"(\w+)=(\S+)", (text or "").strip("{}"))}


class Window(NamedTuple):
    """Describe how a kernel moves along one axis."""

    low: int = 0  # padding before the input
    stride: int = 1
    input_dilation: int = 1
    kernel_dilation: int = 1


def _window_along(window: dict[str, list[str]], axis: int) -> Window:
    def number(name: str) -> int:
        return int(window[name][axis]) if name in window else 1

    low = int(window["pad"][axis].split("_")[0]) if "pad" in window else 0
    return Window(low, number("stride"), number("lhs_dilate"), number("rhs_dilate"))


@functools.cache
def _pairs(size: int, kernel: int, out: int, window: Window) -> int:
    """Count the pairs of output and kernel positions that meet a value of the input, not padding or a gap."""
    starts = np.arange(out)[:, None] * window.stride - window.low
    position = starts + np.arange(kernel)[None] * window.kernel_dilation
    inside = (position >= 0) & (position <= (size - 1) * window.input_dilation)
    return int((inside & (position % window.input_dilation == 0)).sum())


def _kernel_flops(op: Operation, where: Computation) -> float:
    """Return the FLOPs that a kernel states, or those of all scores of a known attention kernel; else 0."""
    if stated := re.search(r'"cost_estimate":(\{[^}]*\})', op.rest):
        return float(json.loads(stated[1])["flops"])
    names = f"{op.name} {op.attribute('custom_call_target')}"
    products = next((products for name, products in KERNELS.items() if name in names), 0)
    if not products:
        return 0.0
    operands = [shape for name in op.operands if name in where for shape in where[name].shapes]
    shapes = [shape.dims for shape in operands if "f" in shape.dtype and len(shape.dims) > 2]
    if len(shapes) < 2:
        return 0.0
    queries, keys = shapes[:2]
    scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*(\[.*?\])', op.rest)  # of cuDNN
    pairs = math.prod(_numbers(scores[1])) if scores else math.prod(queries[:-1]) * keys[-2]
    return 2.0 * products * pairs * queries[-1]


# ----------------------------------------------------------------------------------------------------------
# Traffic
# ----------------------------------------------------------------------------------------------------------


def traffic(run: Executed, computations: dict[str, Computation]) -> float:
    """Return the bytes that one execution moves between the chip's main memory and its cores.

    Operands and results in main memory count once. For an array that is only sliced the slices count, for one that is
    updated in place the update. Custom calls count only if they are kernels that compute.
    """
    op = run.op
    if run.fused or op.opcode in NO_TRAFFIC or op.opcode.endswith("-done") or _collective(op.opcode):
        return 0.0
    if op.opcode == "custom-call" and not _kernel_flops(op, run.where):
        return 0.0
    operands = [run.where[name] for name in op.operands if name in run.where]
    inner = computations.get(op.computation("calls"))
    if op.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _main(op)
    if op.opcode in ("dynamic-update-slice", "scatter"):
        return 2.0 * _main(operands[1 if op.opcode == "dynamic-update-slice" else -1])
    bytes_read = sum(_bytes_read(inner, index, operand) for index, operand in enumerate(operands))
    return bytes_read + (_bytes_written(inner, op) if inner else _main(op))


def _main(op: Operation) -> float:
    """Return the bytes of an operation's results in main memory."""
    return sum(shape.bytes for shape in op.shapes if shape.main)


def _bytes_read(inner: Computation | None, index: int, operand: Operation) -> float:
    """Return the bytes that a call reads of an operand; `inner` is the computation that it calls, if any."""
    whole = _main(operand)
    if not whole or inner is None or index not in inner.parameters:
        return whole
    users = inner.users[inner.parameters[index].name]
    if users and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
        return min(whole, sum(user.bytes for user in users))
    updated = [u for u in users if u.opcode == "dynamic-update-slice" and u.operands[0] == inner.parameters[index].name]
    return 0.0 if users and len(updated) == len(users) else whole


def _bytes_written(inner: Computation, op: Operation) -> float:
    """Return the bytes that a call of `inner` writes to main memory."""
    root = inner.root
    results = [inner[name] for name in root.operands if name in inner] if root.opcode == "tuple" else [root]
    total = 0.0
    for shape, result in zip(op.shapes, results, strict=False):
        update = inner.operand(result, 1) if result.opcode == "dynamic-update-slice" else None
        total += min(shape.bytes, update.bytes if update else shape.bytes) if shape.main else 0.0
    return total


def _collective(opcode: str) -> str | None:
    """Return the kind of a collective by its opcode, asynchronous or not; None for other operations."""
    kind = opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


# ----------------------------------------------------------------------------------------------------------
# Sums
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collective:
    """Describe a collective of one device."""

    kind: str  # one of COLLECTIVES
    groups: np.ndarray  # (groups, members) device numbers in mesh order; of a collective-permute (source, target) pairs
    bytes: float  # of its operands
    times: int  # executions in one run of the module
    loop: str  # as in `Executed`
    source: str  # the operation of the traced program that it comes from
    dtype: str  # of its largest result
    dims: tuple[int, ...]  # of its largest result


@dataclasses.dataclass(frozen=True)
class Counted:
    """Hold the sums over one execution of a module on one device."""

    flops: float  # of products
    bytes: float  # moved to and from main memory
    collectives: tuple[Collective, ...]
    unread: int  # loops with an unknown number of rounds; they count once


def count(text: str, devices: int) -> Counted:
    """Count FLOPs of products, bytes of main memory and collectives in the text of a module for so many devices."""
    _, computations = read(text)
    flops = 0.0
    moved = 0.0
    unread = 0
    found: dict[tuple, Collective] = {}
    for run in executed(text):
        flops += run.times * product_flops(run)
        moved += run.times * traffic(run, computations)
        unread += run.op.opcode == "while" and trip_count(computations, run.where, run.op) is None
        if kind := _collective(run.op.opcode) or between_slices(run.op):
            one = _describe(run, kind, devices)
            # A TPU program repeats an asynchronous collective in the fusions where it starts, runs beside others and
            # ends: count it once, by its channel. Outside of fusions channels do not identify a collective: all those
            # of a `shard_map` have the same.
            identity = (run.op.attribute("channel_id"), one.dims, one.source) if run.fused else run.op.name
            found.setdefault((run.loop, kind, identity), one)
    return Counted(flops, moved, tuple(found.values()), unread)


def _describe(run: Executed, kind: str, devices: int) -> Collective:
    op = run.op
    operands = [shape for name in op.operands if name in run.where for shape in run.where[name].shapes]
    size = sum(shape.bytes for shape in operands)
    scattered = "all-reduce-scatter" in run.caller  # TPUs write a reduce-scatter as an all-reduce inside such a fusion
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
    """Return the kind of a collective between slices, of which the program has only the `send`; the runtime does it."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.rest) if op.opcode == "send" else None
    return kind[1].lower().replace("_", "-") if kind else None


def groups(op: Operation, devices: int) -> np.ndarray:
    """Return the device numbers (groups, members) that exchange data; (pairs, 2) for a collective-permute."""
    if op.opcode == "send":  # to the same chip in other slices, written as slices x chips: {1,2}x{0:3}
        (named,) = _groups(r'.*_xla_megascale_target="\{([\d,:]+)\}', op.rest)
        first, _, last = named.partition(":")
        slices = int(last) - int(first) + 1 if last else len(named.split(","))
        return np.arange(devices).reshape(slices, -1).T
    if pairs := re.search(r"source_target_pairs=\{((?:\{[\d,]*\},?)*)\}", op.rest):
        return np.array([_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])])
    text = re.search(r"replica_groups=(mesh\[.*?\{[^}]*\}|\{\{.*?\}\}|\{\}|\[[^\s]*)", op.rest)
    if text is None or text[1] == "{}":
        if text is None and "replica_groups=" in op.rest:
            raise ValueError(f"the notation of device groups is not known: {op.rest}")
        return np.arange(devices)[None]
    if text[1].startswith("mesh"):
        return _named_groups(text[1])
    if text[1].startswith("{"):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", text[1])])
    (shape,) = _groups(r"\[([\d,]+)\]", text[1])
    return _permuted(text[1].partition("<=")[2]).reshape(tuple(_numbers(shape)))


def _permuted(text: str) -> np.ndarray:
    """Parse "[2,4]T(1,0)": the numbers from 0 on in this shape, with axes transposed."""
    dims, order = _groups(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    numbers = np.arange(math.prod(_numbers(dims))).reshape(tuple(_numbers(dims)))
    return numbers.transpose(_numbers(order)) if order else numbers


def _named_groups(text: str) -> np.ndarray:
    """Parse "mesh['axis_0'=4,'axis_1'=2] {'axis_0'}": groups of devices that differ only along the named axes.

    "mesh[...], device_ids=([2,4]T(1,0)) {...}" has the devices in another order.
    """
    mesh, ids, named = _groups(r"mesh\[([^\]]*)\](?:,\s*device_ids=\(([^\s]*)\))?\s*\{([^}]*)\}", text)
    axes = dict((name, int(size)) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", mesh))
    chosen = [name for name in re.findall(r"[\w.]+", named) if name in axes]
    sizes = tuple(axes.values())
    numbers = (_permuted(ids) if ids else np.arange(math.prod(sizes))).reshape(sizes)
    order = [i for i, name in enumerate(axes) if name not in chosen] + [list(axes).index(name) for name in chosen]
    return numbers.transpose(order).reshape(-1, math.prod(axes[name] for name in chosen))
