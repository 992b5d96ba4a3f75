"""Report a plan: what a chip holds, what is computed and moved, what binds, and what to change."""

import dataclasses
import json

from jax.sharding import Mesh

from sora_jax.nn import params as param
from sora_jax.parallel.chips import GIB
from sora_jax.parallel.compile import OutOfMemory, Topology, bytes_per_device, compile_program, topology_mesh
from sora_jax.plan import hlo, network
from sora_jax.plan.programs import Program, for_accelerator
from sora_jax.plan.suggest import suggest
from sora_jax.train.kind import Kind
from sora_jax.train.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """Hold what one compiled program needs of every chip: bytes, FLOPs and seconds of one call.

    flops and bytes are of one chip, model_flops and units (tokens, pixels) of all. memory: bytes by what holds them;
    activations are what the forward pass keeps for the backward pass. Compiled FLOPs, traffic, collectives and times
    are None for a program that does not fit: the compiler gives none. unread: loops that are counted once, since the
    program does not say how often they run.
    """

    what: str
    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    model: dict[str, object]
    parameters: int
    memory: dict[str, int]
    needed: int
    usable: int
    fits: bool
    model_flops: float
    units: int
    unit: str
    flops: float | None = None
    bytes: float | None = None
    collectives: tuple[network.Traffic, ...] = ()
    times: dict[str, float] | None = None
    unread: int = 0
    suggestion: str = ""

    @property
    def binding(self) -> str | None:
        """The resource that takes longest."""
        return max(self.times.items(), key=lambda cause: cause[1])[0] if self.times else None

    @property
    def ratio(self) -> float | None:
        """Compiled FLOPs of all chips over model FLOPs."""
        return self.chips * self.flops / self.model_flops if self.flops else None

    def utilisation(self, peak: float) -> tuple[float, float]:
        """Return the model-FLOPs utilisation if all that can overlap does, and if nothing does; of a plan that fits."""
        assert self.times is not None
        ideal = self.model_flops / self.chips / peak
        return ideal / max(self.times.values()), ideal / sum(self.times.values())


def make_plan(kind: Kind, config: RunConfig, what: str, topology: Topology) -> Plan:
    """Compile what a run would do on a topology, and count.

    Where training would measure which attention is the fastest, cuDNN's stands in for it.
    """
    if topology.chip.gpu and getattr(config.model, "attention", None) == "auto":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="cudnn"))
    mesh = topology_mesh(config.mesh, topology)
    config = for_accelerator(config)
    made = kind.programs[what](config, mesh)
    compiled = compile_program(made.function, made.arguments, mesh)
    parameters = sum(param.count(group.specs) for group in kind.groups(config).values())
    plan = dataclasses.replace(_bare(config, topology, mesh, made, compiled), what=what, parameters=parameters)
    if plan.fits and not isinstance(compiled, OutOfMemory):
        text = compiled.as_text()
        assert text is not None  # the compilers for TPUs and GPUs give it
        plan = _counted(plan, text, topology, mesh)
    return dataclasses.replace(plan, suggestion=suggest(config, plan, made.load))


def _bare(config: RunConfig, topology: Topology, mesh: Mesh, made: Program, compiled) -> Plan:
    """Make the plan without what is read from the compiled program."""
    memory = {name: bytes_per_device(tree) for name, tree in made.held.items()}
    refused = isinstance(compiled, OutOfMemory)  # a compiler for GPUs refuses nothing
    needed = compiled.needed if refused else _needed(compiled.memory_analysis())
    rest = max(needed - sum(memory.values()), 0)
    if made.activations:  # the compiler may keep less, where it recomputes something
        memory["activations"] = min(bytes_per_device(made.activations), rest)
    memory["temporaries"] = rest - memory.get("activations", 0)
    model = config.model
    shown = ("depth", "width", "heads", "attention", "remat", "dtype", "latent_channels")
    return Plan(
        what="",
        topology=topology.name,
        slices=topology.slices,
        chips=topology.chips,
        mesh=dict(mesh.shape),
        model={name: getattr(model, name) for name in shown if hasattr(model, name)}
        | ({"pack_length": config.packing.length} if hasattr(config, "packing") else {})
        | ({"crop": config.largest} if hasattr(config, "largest") else {})
        | {"batch": made.load.rows},
        parameters=0,
        memory=memory,
        needed=needed,
        usable=topology.chip.usable,
        fits=not refused and needed <= topology.chip.usable,
        model_flops=made.load.model_flops,
        units=made.load.units,
        unit=made.load.unit,
    )


def _needed(stats) -> int:
    """Return the bytes of main memory of a call: arguments, results that take no argument's place, the rest, code."""
    made = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + made + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes


def _counted(plan: Plan, text: str, topology: Topology, mesh: Mesh) -> Plan:
    chip, counted = topology.chip, hlo.count(text, topology.chips)
    collectives = network.summed(counted.collectives, mesh, chip)
    times = {
        "compute": counted.flops / chip.peak,
        "memory": counted.bytes / chip.memory_bandwidth,
        "interconnect": sum(row.seconds for row in collectives),
    }
    if topology.slices > 1:
        times["data-centre network"] = sum(row.between for row in collectives)
    return dataclasses.replace(
        plan,
        flops=counted.flops,
        bytes=counted.bytes,
        collectives=tuple(collectives),
        times=times,
        unread=counted.unread,
    )


def as_json(plan: Plan, topology: Topology) -> str:
    """Return all figures of a plan as JSON; bytes, FLOPs and seconds as plain numbers."""
    derived = {"flops_over_model_flops": plan.ratio, "binding": plan.binding}
    if plan.times:
        derived |= dict(zip(("utilisation_overlapped", "utilisation_serial"), plan.utilisation(topology.chip.peak)))
    return json.dumps(dataclasses.asdict(plan) | derived, indent=1)


def as_text(plan: Plan, topology: Topology) -> str:
    """Return the report as text."""
    return "\n".join([*_head(plan), *_memory(plan), *(_work(plan, topology) if plan.fits else []), *_tail(plan)])


def _head(plan: Plan) -> list[str]:
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one chip"
    slices = f", {plan.slices} slices" if plan.slices > 1 else ""
    model = ", ".join(f"{name} {value}" for name, value in plan.model.items())
    return [
        f"{plan.what} on {plan.topology}{slices}: {plan.chips} chips, mesh {mesh}",
        f"{plan.parameters:,} parameters; {model}",
    ]


def _memory(plan: Plan) -> list[str]:
    share = plan.needed / plan.usable
    verdict = "fits" if plan.fits else "does NOT fit"
    room = (plan.usable - plan.needed) / GIB
    rest = f"{room:.2f} GiB to spare" if room >= 0 else f"{-room:.2f} GiB too much"
    lines = [
        f"\nmemory of a chip: {verdict}, {plan.needed / GIB:.2f} of {plan.usable / GIB:.2f} GiB ({share:.0%}), {rest}"
    ]
    return lines + [f"  {name:14} {size / GIB:9.3f} GiB" for name, size in plan.memory.items()]


def _work(plan: Plan, topology: Topology) -> list[str]:
    assert plan.flops is not None and plan.bytes is not None and plan.times is not None  # known of a plan that fits
    chip = topology.chip
    best, serial = plan.utilisation(chip.peak)
    lines = [
        f"\nFLOPs of a call: {plan.chips * plan.flops:.4g} compiled, {plan.model_flops:.4g} of the model,"
        f" {plan.ratio:.3f}x",
        f"bytes of a chip: {_figure(plan.bytes / 1e9)} GB to and from memory",
        "collectives (bytes of a chip)" if plan.collectives else "collectives: none",
    ]
    for row in plan.collectives:
        between = f" + {_figure(1e3 * row.between)} ms between slices" if row.between else ""
        spent = f"{_figure(1e3 * row.seconds):>9} ms{between}"
        size = f"{_figure(row.bytes / 1e9):>10} GB"
        lines.append(f"  {row.kind:19} {'+'.join(row.axes):20} {row.runs:6} x {size} {spent}")
    lines.append(f"\nroofline of a call on {chip.name}, at its peak rates")
    lines += [f"  {name:20} {_figure(1e3 * spent):>10} ms" for name, spent in plan.times.items()]
    rate = plan.units / max(plan.times.values())
    lines.append(f"{plan.binding} binds; model-FLOPs utilisation at most {best:.0%}, {serial:.0%} if nothing overlaps")
    if plan.unread:
        lines.append(f"loops that the program does not tell the rounds of, counted once: {plan.unread}")
    return [*lines, f"at most {rate:,.0f} {plan.unit} a second; estimated from the compiled program, not measured"]


def _figure(value: float) -> str:
    """Format three significant digits, and all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _tail(plan: Plan) -> list[str]:
    return [f"\n{plan.suggestion}"] if plan.suggestion else []
