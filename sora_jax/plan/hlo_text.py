"""Reads the text of compiled programs: operations, and how often each is executed.

The text is that of one device after partitioning. It is walked from its entry, through loops as often as they run.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0, "bf16": 2} | {
    f"{kind}{bits}": bits // 8 for kind in "sufc" for bits in (8, 16, 32, 64, 128)
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of the text: dtype, dimensions, and whether it lies in the chip's main memory."""

    dtype: str
    dims: tuple[int, ...]
    main: bool

    @property
    def bytes(self) -> float:
        return math.prod(self.dims) * BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else 2)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line: name, opcode, arrays it makes (several of a tuple), names of operands, and the rest of the line."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str
    rest: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """The value of `name=` in the rest of the line, up to the next comma or space outside brackets."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|\"[^\"]*\"|[^,\s]+)", self.rest)
        return found and found[1]

    @property
    def bytes(self) -> float:
        return sum(shape.bytes for shape in self.shapes)


class Computation(dict):
    """Operations by name, in order; `root` is the last of them to be named so."""

    @property
    def root(self) -> Operation:
        return next(op for op in self.values() if op.root)

    def operand(self, op: Operation, index: int) -> Operation | None:
        return self.get(op.operands[index]) if index < len(op.operands) else None

    @functools.cached_property
    def parameters(self) -> dict[int, Operation]:
        return {int(op.inside): op for op in self.values() if op.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Operation]]:
        users: dict[str, list[Operation]] = {name: [] for name in self}
        for op in self.values():
            for name in set(op.operands):
                users.get(name, []).append(op)
        return users


_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


def read(text: str) -> tuple[str, dict[str, Computation]]:
    """Name of the entry, and all computations of a module's text by name."""
    computations, entry, current = {}, "", Computation()
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
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing - 1]
    return Operation(
        name, text[end:opening].strip(), _shapes(text[:end]), tuple(_NAME.findall(inside)), inside, text[closing:], root
    )


def _closing(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"unbalanced brackets: {text[:80]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" not in layout)
        for dtype, dims, layout in _SHAPE.findall(text)
    )


@dataclasses.dataclass(frozen=True)
class Executed:
    """An operation as often as it runs: `times`, in computation `where`, inside a fusion or not, in loop `loop`."""

    op: Operation
    where: Computation
    times: int
    fused: bool
    loop: str
    caller: str


def executed(text: str) -> Iterator[Executed]:
    """Every operation that a run of the module executes, with how often. Of branches the first that are there all count
    once: which is taken is not known."""
    entry, computations = read(text)
    yield from _walk(computations, entry, 1, False, entry, entry)


def _walk(computations, name: str, times: int, fused: bool, loop: str, caller: str) -> Iterator[Executed]:
    where = computations[name]
    for op in where.values():
        yield Executed(op, where, times, fused, loop, name)
        if op.opcode == "while":
            body, count = op.attribute("body").lstrip("%"), trip_count(computations, where, op)
            yield from _walk(computations, body, times * (count or 1), False, f"{loop}/{body}", name)
        elif op.opcode == "conditional":
            for branch in _NAME.findall(re.search(r"branch_computations=\{[^}]*\}|true_computation.*", op.rest)[0]):
                if branch in computations:
                    yield from _walk(computations, branch, times, False, loop, name)
        elif op.opcode in ("fusion", "call", "async-start") or op.opcode.endswith("-start"):
            called = op.attribute("calls") or (op.opcode == "call" and op.attribute("to_apply"))
            if called and called.lstrip("%") in computations:
                inner = fused or op.opcode == "fusion"
                yield from _walk(computations, called.lstrip("%"), times, inner, loop, name)


def trip_count(computations, where: Computation, op: Operation) -> int | None:
    """How often a while loop runs: as the compiler notes it, or the number that its counter is compared with.

    At most, of one that depends on data: blocks of attention that meet no common segment are left out. None of one
    that tells nothing.
    """
    if known := re.search(r'"known_trip_count":\{"n":"?(\d+)', op.rest):
        return int(known[1])
    if most := re.search(r'op_name="[^"]*at_most_(\d+)\b[^"]*"', op.rest):
        return int(most[1])
    condition = computations[op.attribute("condition").lstrip("%")]
    compared = [int(c.inside) for c in condition.values() if c.opcode == "constant" and c.inside.lstrip("-").isdigit()]
    if len(compared) != 1:
        return None
    return -(-(compared[0] - _start(where, condition, op)) // _stride(computations, condition, op))


def _stride(computations, condition: Computation, op: Operation) -> int:
    """By how much the counter of a loop grows in a round: by two where the compiler has made one round of two."""
    body = computations[op.attribute("body").lstrip("%")]
    counter = next((c for c in condition.values() if c.opcode == "get-tuple-element"), None)
    grown = counter and body.operand(body.root, int(counter.attribute("index")))
    if not grown or grown.opcode != "add":
        return 1
    numbers = [body[name].inside for name in grown.operands if name in body and body[name].opcode == "constant"]
    return int(numbers[0]) if len(numbers) == 1 and numbers[0].isdigit() and int(numbers[0]) else 1


def _start(where: Computation, condition: Computation, op: Operation) -> int:
    """What the counter of a loop starts from; 0 where it is not a plain number."""
    counter = next((c for c in condition.values() if c.opcode == "get-tuple-element"), None)
    start = where.operand(op, 0)
    if counter is None or start is None or start.opcode != "tuple":
        return 0
    value = where.operand(start, int(counter.attribute("index")))
    while value is not None and value.opcode in ("copy", "bitcast") and value.operands:
        value = where.operand(value, 0)
    plain = value is not None and value.opcode == "constant" and value.inside.isdigit()
    return int(value.inside) if plain else 0
