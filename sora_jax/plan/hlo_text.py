"""Parse the HLO text of compiled programs: operations, and how often each is executed.

The text is that of one device after partitioning. It is walked from its entry computation, through loops as often as
they run.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Bytes of an element by dtype; f8 of all sorts is in `Shape.bytes`.
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0, "bf16": 2} | {
    f"{kind}{bits}": bits // 8 for kind in "sufc" for bits in (8, 16, 32, 64, 128)
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Describe one array."""

    dtype: str
    dims: tuple[int, ...]
    main: bool  # True: in the chip's main memory; False: in a faster memory of its cores

    @property
    def bytes(self) -> float:
        """Return the size in bytes."""
        return math.prod(self.dims) * BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else 2)


@dataclasses.dataclass(frozen=True)
class Operation:
    """Describe the operation of one line."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of its results: several for a tuple
    operands: tuple[str, ...]  # names
    inside: str  # the text between the brackets of the operands: the value of a constant, the number of a parameter
    rest: str  # of the line: attributes
    root: bool  # True for the result of its computation

    def attribute(self, name: str) -> str | None:
        """Return the value of `name=` in the rest of the line, or None."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|\"[^\"]*\"|[^,\s]+)", self.rest)
        return found[1] if found else None

    def computation(self, name: str) -> str:
        """Return the name of the computation in the attribute `name=`; "" if there is none."""
        return (self.attribute(name) or "").lstrip("%")

    @property
    def bytes(self) -> float:
        """Return the size in bytes of all results."""
        return sum(shape.bytes for shape in self.shapes)


class Computation(dict[str, Operation]):
    """Hold the operations of a computation by name, in order."""

    @property
    def root(self) -> Operation:
        """Return the operation whose result is that of the computation."""
        return next(op for op in self.values() if op.root)

    def operand(self, op: Operation, index: int) -> Operation | None:
        """Return the operation that computes an operand, or None if it is not in this computation."""
        return self.get(op.operands[index]) if index < len(op.operands) else None

    @functools.cached_property
    def parameters(self) -> dict[int, Operation]:
        """Return the parameters by number."""
        return {int(op.inside): op for op in self.values() if op.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Operation]]:
        """Return the operations that use each operation, by its name."""
        users: dict[str, list[Operation]] = {name: [] for name in self}
        for op in self.values():
            for name in set(op.operands):
                users.get(name, []).append(op)
        return users


Computations = dict[str, Computation]
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


def read(text: str) -> tuple[str, Computations]:
    """Parse the text of a module: return the name of its entry, and all computations by name."""
    computations: Computations = {}
    entry = ""
    current = Computation()
    for line in text.splitlines():
        if line and not line[0].isspace():
            head = _HEAD.match(line)
            if head and "->" in line:
                current = computations[head[2]] = Computation()
                entry = head[2] if head[1] else entry
        elif found := _LINE.match(line):
            op = _operation(found[2], found[3], bool(found[1]))
            current[op.name] = op
    return entry, computations


def _operation(name: str, text: str, root: bool) -> Operation:
    """Parse the right side of a line."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing - 1]
    return Operation(
        name, text[end:opening].strip(), _shapes(text[:end]), tuple(_NAME.findall(inside)), inside, text[closing:], root
    )


def _closing(text: str, start: int) -> int:
    """Return the index after the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index + 1
    raise ValueError(f"unbalanced brackets: {text[:80]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" not in layout)
        for dtype, dims, layout in _SHAPE.findall(text)
    )


@dataclasses.dataclass(frozen=True)
class Executed:
    """Describe an operation and how often it runs."""

    op: Operation
    where: Computation  # that it belongs to
    times: int  # executions in one run of the module
    fused: bool  # True inside a fusion
    loop: str  # path of names: the entry, then the bodies of the loops around it
    caller: str  # name of the computation it belongs to


def executed(text: str) -> Iterator[Executed]:
    """Yield every operation that a run of the module executes, and how often.

    Which branch of a conditional is taken is not known, so all branches count, once each.
    """
    entry, computations = read(text)
    yield from _walk(computations, entry, 1, False, entry)


def _walk(computations: Computations, name: str, times: int, fused: bool, loop: str) -> Iterator[Executed]:
    """Yield the operations of a computation that is executed `times` times, and of those that it calls."""
    where = computations[name]
    for op in where.values():
        yield Executed(op, where, times, fused, loop, name)
        if op.opcode == "while":
            body = op.computation("body")
            rounds = trip_count(computations, where, op) or 1
            yield from _walk(computations, body, times * rounds, False, f"{loop}/{body}")
        elif op.opcode == "conditional":
            branches = re.search(r"branch_computations=\{[^}]*\}|true_computation.*", op.rest)
            for branch in _NAME.findall(branches[0] if branches else ""):
                if branch in computations:
                    yield from _walk(computations, branch, times, False, loop)
        elif op.opcode in ("fusion", "call", "async-start") or op.opcode.endswith("-start"):
            called = op.computation("calls") or (op.opcode == "call" and op.computation("to_apply"))
            if called and called in computations:
                inner = fused or op.opcode == "fusion"
                yield from _walk(computations, called, times, inner, loop)


def trip_count(computations: Computations, where: Computation, op: Operation) -> int | None:
    """Return how often a while loop runs: as the compiler notes it, or from its counter; None if neither is known.

    For a loop whose number of rounds depends on data, such as attention that skips blocks without a common segment, it
    is the largest number.
    """
    if known := re.search(r'"known_trip_count":\{"n":"?(\d+)', op.rest):
        return int(known[1])
    if most := re.search(r'op_name="[^"]*at_most_(\d+)\b[^"]*"', op.rest):  # a `named_scope` of ours around the loop
        return int(most[1])
    condition = computations[op.computation("condition")]
    compared = [int(c.inside) for c in condition.values() if c.opcode == "constant" and c.inside.lstrip("-").isdigit()]
    if len(compared) != 1:
        return None
    return -(-(compared[0] - _start(where, condition, op)) // _stride(computations, condition, op))


def _counter(condition: Computation) -> int | None:
    """Return the index of a loop's counter in the tuple that the loop carries."""
    reads = (c for c in condition.values() if c.opcode == "get-tuple-element")
    return next((int(c.attribute("index") or 0) for c in reads), None)


def _stride(computations: Computations, condition: Computation, op: Operation) -> int:
    """Return the step of a loop's counter: two if the compiler has unrolled the loop by two, usually one."""
    body = computations[op.computation("body")]
    counter = _counter(condition)
    grown = None if counter is None else body.operand(body.root, counter)
    if not grown or grown.opcode != "add":
        return 1
    numbers = [body[name].inside for name in grown.operands if name in body and body[name].opcode == "constant"]
    return int(numbers[0]) if len(numbers) == 1 and numbers[0].isdigit() and int(numbers[0]) else 1


def _start(where: Computation, condition: Computation, op: Operation) -> int:
    """Return the initial value of a loop's counter; 0 if it is not a constant."""
    counter = _counter(condition)
    start = where.operand(op, 0)
    if counter is None or start is None or start.opcode != "tuple":
        return 0
    value = where.operand(start, counter)
    while value is not None and value.opcode in ("copy", "bitcast") and value.operands:
        value = where.operand(value, 0)
    if value is None or value.opcode != "constant" or not value.inside.isdigit():
        return 0
    return int(value.inside)
