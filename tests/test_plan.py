"""Planning without a TPU: what is counted in compiled programs, the network, the step at 512 devices, suggestions."""

import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_runs import run
from jax.sharding import AbstractMesh, AxisType

from sora_jax.config import load
from sora_jax.data.packing.packs import PackingConfig
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.diffusion.solvers import SolverConfig
from sora_jax.errors import UserError
from sora_jax.kinds import run_config
from sora_jax.kinds.denoiser import DENOISER
from sora_jax.models.autoencoder import AutoencoderConfig
from sora_jax.models.text import TextConfig
from sora_jax.models.transformer import TransformerConfig, denoiser_specs
from sora_jax.nn.params import ParamSpec, count
from sora_jax.parallel.chips import CHIPS, GIB
from sora_jax.parallel.compile import OutOfMemory, Topology, mesh_sizes, out_of_memory, use_mesh
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.parallel.rules import MESH_AXES
from sora_jax.plan import hlo, hlo_text, network
from sora_jax.plan.autoencoder import train_autoencoder
from sora_jax.plan.denoiser import evaluations, full_pack, grid_of_length, load_of, train_denoiser
from sora_jax.plan.programs import Program, for_accelerator
from sora_jax.plan.report import Plan, as_json, as_text
from sora_jax.plan.suggest import suggest
from sora_jax.train.autoencoder import AutoencoderRun, StageConfig
from sora_jax.train.denoiser import DenoiserRun

ROOT = Path(__file__).parents[1]
TEXT = TextConfig(vocabulary=32, width=64, depth=2, head_width=32)
MODEL = TransformerConfig(depth=4, width=128, heads=4, latent_channels=4, text=TEXT, dtype="float32")
RUN = DenoiserRun(model=MODEL, batch=8, packing=PackingConfig(length=256, slots=1, text_length=32))
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install libtpu"
)


def model(**changes) -> DenoiserRun:
    return dataclasses.replace(RUN, model=dataclasses.replace(MODEL, **changes))


def one_chip():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def compiled(program: Program, mesh) -> str:
    with use_mesh(mesh):
        return program.function.lower(*program.arguments).compile().as_text()


def text_of(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


# --- arithmetic ---


def test_what_is_in_loops_counts_as_often_as_it_runs():
    def function(x, weights):
        inner = lambda x, weight: (jax.lax.scan(lambda x, _: (jnp.tanh(x @ weight), None), x, None, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(inner, x, weights)[0]

    text = text_of(function, jnp.zeros((48, 64)), jnp.zeros((5, 64, 64)))
    assert hlo.count(text, 1).flops == 5 * 3 * 2 * 48 * 64 * 64


@pytest.mark.parametrize("options", [
    dict(window_strides=(1, 1), padding="SAME"),
    dict(window_strides=(2, 1), padding=((0, 3), (2, 1))),
    dict(window_strides=(1, 2), padding=((0, 0), (1, 0)), lhs_dilation=(2, 1), rhs_dilation=(1, 3)),
    dict(window_strides=(1, 1), padding="SAME", feature_group_count=2),
])  # fmt: skip
def test_convolutions_count_as_xla_counts_them(options):
    """Padding and the gaps of a dilation are no work; a TPU writes batched products as such convolutions."""
    groups = options.get("feature_group_count", 1)
    image, kernel = jnp.zeros((2, 9, 10, 4)), jnp.zeros((3, 2, 4 // groups, 6))
    numbers = ("NHWC", "HWIO", "NHWC")
    lowered = jax.jit(lambda x, w: jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)).lower(
        image, kernel
    )
    text = lowered.compile().as_text()
    if "convolution(" not in text:
        pytest.skip("this XLA compiles it to something else")
    assert hlo.count(text, 1).flops == lowered.cost_analysis()["flops"]


def test_the_compiled_step_does_the_work_of_the_model():
    """The target without recomputation, 1.03 of the model's FLOPs; with it, 1.36, below, on eight devices."""
    program = train_denoiser(for_accelerator(model(remat="none", attention="dense", text=None)), one_chip())
    ratio = hlo.count(compiled(program, one_chip()), 1).flops / program.load.model_flops
    assert 0.98 < ratio <= 1.03


def test_activations_are_what_remat_says():
    """Of 4 blocks of width 128 on 8 packs of 256 tokens, without text: inputs, with attention's output, and more."""
    tokens, depth, width, heads = 8 * 256, 4, 128, 4

    def kept(remat):
        run_ = model(remat=remat, attention="blockwise", text=None)
        arrays = train_denoiser(for_accelerator(run_), one_chip()).activations
        return [x for x in arrays if x.shape[:1] == (depth,) and x.size >= depth * tokens * heads]

    full, attention, none = (kept(remat) for remat in ("full", "attention", "none"))
    assert sum(x.size for x in full) == depth * tokens * width
    assert sum(x.size for x in attention) == depth * tokens * (2 * width + heads)  # its output and the sums of scores
    assert sum(x.size for x in none) > 10 * depth * tokens * width


@pytest.mark.parametrize("solver, spacing, steps, calls", [
    ("euler", "even", "7", 7), ("heun", "even", "7", 13), ("dpm2", "even", "5", 5), ("ddim", "even", "ddim5", 5)
])  # fmt: skip
def test_calls_of_the_model_are_counted(solver, spacing, steps, calls):
    spacing = "respaced" if steps.startswith("ddim") else spacing
    run_ = RUN if spacing == "even" else dataclasses.replace(
        RUN, diffusion=dataclasses.replace(RUN.diffusion, process="vp_linear", prediction="eps")
    )  # fmt: skip
    sampling = SamplingConfig(steps=steps, spacing=spacing, solver=SolverConfig(name=solver))
    assert evaluations(run_, sampling) == calls


# --- collectives ---


@pytest.mark.parametrize(
    ("length", "multiple", "grid"),
    [(4096, (1, 1), (16, 16, 16)), (1000, (4, 4), (62, 4, 4)), (48, (2, 4), (3, 4, 4)), (37, (1, 1), (37, 1, 1))],
)
def test_a_full_pack_is_a_clip_of_sides_that_differ_least(length, multiple, grid):
    """Else windows and convolutions would have less to do than in clips as they are."""
    assert grid_of_length(length, multiple) == grid
    model = TransformerConfig(depth=1, width=16, heads=2, patch=(1, 2, 2), latent_channels=2, text=None)
    pack = full_pack(DenoiserRun(model=model, packing=PackingConfig(length=length)))
    assert (pack["segments_BL"] == 1).all() and pack["grids_BS3"][0, 0].prod() == length


def test_collectives_are_found_with_kind_axes_bytes_and_runs():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    P = jax.P

    def each(x):  # x: (2, 16) on a device
        def body(x, _):
            gathered = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)  # (8, 16)
            return jax.lax.psum_scatter(gathered, "fsdp", scatter_dimension=0, tiled=True) + 1, None

        x = jax.lax.scan(body, x, None, length=5)[0]
        x = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        return jax.lax.psum(x, ("data", "fsdp"))

    function = jax.jit(jax.shard_map(each, in_specs=P(("data", "fsdp")), out_specs=P(), check_vma=False))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.zeros((16, 16)), jax.NamedSharding(mesh, P(("data", "fsdp"))))
        found = hlo.count(function.lower(x).compile().as_text(), 8).collectives
    shown = {(c.kind, network.axes_of(c.groups, mesh), c.bytes, c.times) for c in found}
    row = 4 * 2 * 16
    assert shown == {
        ("all-gather", ("fsdp",), row, 5),
        ("reduce-scatter", ("fsdp",), 4 * row, 5),
        ("collective-permute", ("fsdp",), row, 1),
        ("all-reduce", ("data", "fsdp"), row, 1),
    }


@pytest.mark.parametrize("written", [
    "replica_groups={{0,2,4,6},{1,3,5,7}}, x",
    "replica_groups=[2,4]<=[4,2]T(1,0), x",
    "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x",
    "replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_2'}, x",
])  # fmt: skip
def test_groups_are_read_in_every_notation(written):
    op = hlo_text.Operation("a", "all-gather", (), (), "", written, False)
    np.testing.assert_array_equal(hlo.groups(op, 8), [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_groups_in_a_notation_that_is_not_known_are_no_groups_of_all():
    op = hlo_text.Operation("a", "all-gather", (), (), "", "replica_groups=some[2]", False)
    with pytest.raises(ValueError, match="not known: replica_groups=some"):
        hlo.groups(op, 8)


def test_collectives_of_one_channel_count_each():
    """All that `shard_map` makes are of channel 1."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))

    def each(x):
        for _ in range(5):
            x = jnp.sin(jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])) @ jnp.ones((16, 16))
        return x

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.zeros((16, 16)), jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        text = text_of(jax.shard_map(each, in_specs=x.sharding.spec, out_specs=x.sharding.spec), x)
    kinds = [(c.kind, c.bytes, network.axes_of(c.groups, mesh)) for c in hlo.count(text, 8).collectives]
    assert kinds == 5 * [("collective-permute", 2 * 16 * 4, ("fsdp",))]


def test_a_step_over_slices_gathers_parameters_inside_them_alone():
    mesh = make_mesh(MeshConfig(slice=2, data=1, fsdp=4))
    program = train_denoiser(dataclasses.replace(model(remat="full", attention="dense", text=None), batch=16), mesh)
    axes = {(c.kind, network.axes_of(c.groups, mesh)) for c in hlo.count(compiled(program, mesh), 8).collectives}
    assert ("all-gather", ("fsdp",)) in axes and not any(k == "all-gather" and "slice" in a for k, a in axes)


@pytest.mark.parametrize("bound, start, stride, rounds", [(8, 0, 1, 8), (8, 0, 2, 4), (9, 0, 2, 5), (8, 2, 3, 2)])
def test_rounds_are_counted_by_what_the_counter_grows(bound, start, stride, rounds):
    """Of a product over chips whose parts arrive one by one the compiler may do two in a round."""
    text = f"""
%body (t: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {{
  %t = (s32[], f32[8,8]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8,8]{{1,0}} get-tuple-element(%t), index=1
  %stride = s32[] constant({stride})
  %next = s32[] add(%i, %stride)
  %y = f32[8,8]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %again = (s32[], f32[8,8]{{1,0}}) tuple(%next, %y)
}}

%cond (t: (s32[], f32[8,8])) -> pred[] {{
  %t = (s32[], f32[8,8]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %bound = s32[] constant({bound})
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}}

ENTRY %main (x: f32[8,8]) -> (s32[], f32[8,8]) {{
  %x = f32[8,8]{{1,0}} parameter(0)
  %start = s32[] constant({start})
  %first = (s32[], f32[8,8]{{1,0}}) tuple(%start, %x)
  ROOT %loop = (s32[], f32[8,8]{{1,0}}) while(%first), condition=%cond, body=%body
}}
"""
    assert hlo.count(text, 1).flops == rounds * 2 * 8**3


def test_a_loop_that_cannot_be_read_counts_once_and_is_told():
    text = text_of(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), jnp.ones((8, 8)))
    counted = hlo.count(text, 1)
    assert (counted.flops, counted.unread) == (2 * 8**3, 1)
    assert hlo.count(text_of(lambda x: x @ x, jnp.ones((8, 8))), 1).unread == 0


def test_an_asynchronous_collective_counts_once():
    """A TPU writes it where it starts, where it runs beside other work, and where it ends; the channel is the same."""
    line = "  %ag{n} = f32[8]{{0}} all-gather(%p{n}), channel_id=7, replica_groups=[1,4]<=[4], dimensions={{0}}\n"
    part = "%f{n} (p{n}: f32[2]) -> f32[8] {{\n  %p{n} = f32[2]{{0}} parameter(0)\n  ROOT" + line[1:] + "}}\n\n"
    calls = "".join(f"  %c{n} = f32[8]{{0}} fusion(%p), kind=kCustom, calls=%f{n}\n" for n in range(3))
    entry = (
        "ENTRY %main (p: f32[2]) -> f32[8] {\n  %p = f32[2]{0} parameter(0)\n"
        + calls.replace("  %c2", "  ROOT %c2")
        + "}\n"
    )
    found = hlo.count("".join(part.format(n=n) for n in range(3)) + entry, 4).collectives
    assert [(c.kind, c.bytes, c.times) for c in found] == [("all-gather", 8.0, 1)]


def test_what_the_runtime_moves_between_slices_is_a_collective():
    """Of two slices of four chips: a chip sends its 4 KiB to its like in the other, in a loop of three."""
    about = '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"'
    sent = f"is_host_transfer=true, frontend_attributes={{{about}}}"
    thrice = 'condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    text = f"""
%body (t: (s32[], f32[1,8,128])) -> (s32[], f32[1,8,128]) {{
  %t = (s32[], f32[1,8,128]{{2,1,0}}) parameter(0)
  %x = f32[1,8,128]{{2,1,0}} get-tuple-element(%t), index=1
  %token = token[] after-all()
  %send = (f32[1,8,128]{{2,1,0}}, u32[], token[]) send(%x, %token), channel_id=2, {sent}
  ROOT %again = (s32[], f32[1,8,128]{{2,1,0}}) tuple(%x, %x)
}}

ENTRY %main (p: (s32[], f32[1,8,128])) -> (s32[], f32[1,8,128]) {{
  %p = (s32[], f32[1,8,128]{{2,1,0}}) parameter(0)
  ROOT %loop = (s32[], f32[1,8,128]{{2,1,0}}) while(%p), {thrice}
}}
"""
    (found,) = hlo.count(text, 8).collectives
    mesh = torus((2, 2), slice=2, fsdp=4)
    assert (found.kind, found.bytes, found.times, network.axes_of(found.groups, mesh)) == (
        "all-reduce",
        4096,
        3,
        ("slice",),
    )
    inside, between = network.seconds(found, ("slice",), mesh, CHIPS["v5e"])
    assert inside == 0 and between == 4096 / CHIPS["v5e"].data_centre


@dataclasses.dataclass
class Device:
    coords: tuple[int, ...]


def torus(shape: tuple[int, ...], **axes):
    """A mesh stand-in over chips at all places of a torus; the fast coordinates belong to the last axes."""
    sizes = {axis: axes.get(axis, 1) for axis in MESH_AXES}
    places = [Device(tuple(int(n) for n in np.unravel_index(i, shape))) for i in range(math.prod(shape))]
    grid = np.empty(len(places) * sizes["slice"], object)
    grid[:] = places * sizes["slice"]
    mesh = type("Torus", (), {})()
    mesh.shape, mesh.devices = sizes, grid.reshape(tuple(sizes.values()))
    return mesh


def collective(kind: str, members: int, size: float) -> hlo.Collective:
    return hlo.Collective(kind, np.arange(members)[None], size, 1, "", "", "f32", ())


def test_times_on_the_network_follow_the_equations():
    chip = CHIPS["v5p"]
    ring = torus((4, 4, 4), fsdp=64)
    assert network.links(("fsdp",), ring, chip) == 6
    line = torus((2, 2, 1), fsdp=2, tensor=2)
    assert network.links(("fsdp",), line, chip) == network.links(("tensor",), line, chip) == 1
    at = lambda kind, size: network.seconds(collective(kind, 64, size), ("fsdp",), ring, chip)[0] * 6 * chip.link  # noqa: E731
    assert at("all-gather", 10.0) == pytest.approx(10 * 63)
    assert at("reduce-scatter", 640.0) == pytest.approx(10 * 63)
    assert at("all-reduce", 640.0) == pytest.approx(2 * 10 * 63)


def test_between_slices_a_chip_moves_its_share():
    chip, mesh = CHIPS["v5p"], torus((4, 4, 4), slice=2, fsdp=64)
    inside, between = network.seconds(collective("all-reduce", 128, 640.0), ("slice", "fsdp"), mesh, chip)
    assert inside * 6 * chip.link == pytest.approx(2 * 640 * 63 / 64)
    assert between * chip.data_centre == pytest.approx(2 * 10 * 1 / 2)


# --- forbidden collectives ---

MESHES = {
    "fsdp=8": MeshConfig(data=1, fsdp=8),
    "slice=2 fsdp=2 tensor=2": MeshConfig(slice=2, data=1, fsdp=2, tensor=2),
}


def forbidden(text: str, mesh, run_: DenoiserRun) -> list[str]:
    """All-gathers and all-to-alls along the axes that split packs, of more than one layer's largest parameter.

    Activations are larger than that, and so are parameters of all layers at once.
    """
    specs = jax.tree.leaves(denoiser_specs(run_.model), is_leaf=lambda x: isinstance(x, ParamSpec))
    largest = max(math.prod(s.shape) // (s.shape[0] if s.axes[0] == "layers" else 1) for s in specs)
    activations = run_.batch * run_.packing.length * run_.model.width
    assert largest < activations / 2
    found = []
    for c in hlo.count(text, mesh.size).collectives:
        axes = network.axes_of(c.groups, mesh)
        whole = c.bytes / hlo_text.BYTES[c.dtype] * c.groups.shape[1]
        if c.kind in ("all-gather", "all-to-all") and {"slice", "data", "fsdp"} & set(axes) and whole > largest:
            found.append(f"{c.kind} of {c.dtype}{c.dims} along {axes}: {c.source}")
    return found


@pytest.mark.parametrize("name, text", [("fsdp=8", None), ("slice=2 fsdp=2 tensor=2", TEXT)])
def test_no_step_gathers_activations_or_more_than_a_layer_of_parameters(name, text):
    """Every block computed again, the step does 4/3 of the model's FLOPs; at most 1.36 on all chips together."""
    mesh = make_mesh(MESHES[name])
    run_ = dataclasses.replace(model(remat="full", attention="dense", text=text), batch=16)
    program = train_denoiser(for_accelerator(run_), mesh)
    text = compiled(program, mesh)
    assert forbidden(text, mesh, run_) == []
    counted = hlo.count(text, 8)
    kinds = {c.kind for c in counted.collectives}
    assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
    assert 1.3 < 8 * counted.flops / program.load.model_flops <= 1.36


def test_gathered_activations_and_stacked_parameters_are_found():
    mesh = make_mesh(MESHES["fsdp=8"])
    with jax.set_mesh(mesh):
        for shape, before, after in [
            ((8, 256, 128), jax.P("fsdp"), jax.P()),
            ((4, 128, 512), jax.P(None, "fsdp"), jax.P()),
            ((4, 128, 1024), jax.P(None, "fsdp"), jax.P(None, None, "fsdp")),
        ]:
            x = jax.device_put(jnp.zeros(shape), jax.NamedSharding(mesh, before))
            text = jax.jit(lambda x, after=after: jnp.sin(jax.reshard(x, after))).lower(x).compile().as_text()
            assert forbidden(text, mesh, RUN), shape


# --- 512 devices ---


@pytest.mark.parametrize("sizes", [(1, 1, 512, 1, 1), (2, 4, 8, 2, 4)])
def test_a_whole_training_step_is_laid_out_on_512_devices(sizes):
    """Loss, gradients, optimizer and averages of the 3b config: traced, every new array lies as the old one did."""
    config = run_config(load(f"{ROOT}/configs/sora.py:3b", ["batch=512"]))
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))
    program = train_denoiser(for_accelerator(config), mesh)
    with use_mesh(mesh):
        state, metrics = jax.eval_shape(program.function, *program.arguments)
    layout = lambda x: (x.shape, x.dtype, x.sharding.spec)  # noqa: E731
    old = program.arguments[0]
    for before, after in zip(jax.tree.leaves(old.params), jax.tree.leaves(state.params), strict=True):
        assert layout(before) == layout(after)
    assert jax.tree.map(layout, old.ema) == jax.tree.map(layout, state.ema)
    assert metrics["loss"].shape == ()


# --- topologies and configs ---


@pytest.mark.parametrize("name, said", [
    ("v4:8", "'v4'; allowed: 'v5e', 'v5p', 'v6e', 'a100', 'h100', 'h200'"),
    ("h100:2x8", "'h100:2x8'.*one number after the chip, such as h100:8"),
    ("v5e:4x0", "2 numbers"),
    ("v5p:4x4", "'v5p:4x4'.*3 numbers after the chip, such as v5p:4x4x8"),
    ("v5e:fourxfour", "2 numbers"),
])  # fmt: skip
def test_a_topology_that_is_none_is_refused(name, said):
    with pytest.raises(UserError, match=said):
        Topology.parse(name)


def test_a_mesh_fills_its_topology():
    two = Topology.parse("v5p:4x4x8", slices=2)
    assert two.chips == 256
    assert mesh_sizes(MeshConfig(data=1, fsdp=-1, tensor=4), two) == (2, 1, 32, 1, 4)
    with pytest.raises(UserError, match=r"fsdp=7.*256 chips of --topology=v5p:4x4x8 --slices=2"):
        mesh_sizes(MeshConfig(data=1, fsdp=7), two)
    with pytest.raises(UserError, match="slice is 4; it must be the number of slices, 2"):
        mesh_sizes(MeshConfig(slice=4, data=1, fsdp=-1), two)


def plan_options(variant: str, *more: str) -> list[str]:
    return ["plan", f"--config={ROOT}/configs/sora.py:{variant}", *more]


@pytest.mark.parametrize("topology, said", [("v5e:2x2", "pip install libtpu"), ("h100:8", "pip install 'jax[cuda13]'")])
def test_without_a_compiler_a_sentence_says_how_to_get_it(monkeypatch, capsys, topology, said):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(*plan_options("tiny", f"--topology={topology}")) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


@pytest.mark.parametrize("options, said", [
    (["--topology=v5e:2x2", "--what=dream"], "'dream'"),
    (["--topology=v5e:2x2", "--what=autoencoder"], "'train', 'sample'"),
    (["--topology=v5e:2x2", "--pack-length=0"], "packing.length is 0"),
    (["--topology=v5e:2x2", "--slices=0"], "--slices is 0"),
])  # fmt: skip
def test_mistakes_are_told_in_a_sentence(capsys, options, said):
    assert run(*plan_options("tiny", *options)) == 2
    assert said in capsys.readouterr().err


def test_an_autoencoder_is_planned_for_its_largest_crop():
    model = AutoencoderConfig(width=8, multipliers=(1,), patch=(4, 8), latent_channels=4)
    config = AutoencoderRun(model=model, crop=(5, 16, 16), crops=((1, 48, 48),), batch=2, image_share=0.0)
    later = dataclasses.replace(config, stages=(StageConfig(), StageConfig(crop=(9, 32, 64), batch=4)))
    mesh = one_chip()
    with use_mesh(mesh):
        planned = [train_autoencoder(each, mesh) for each in (config, later)]
    shapes = [program.held["batch"]["videos_BTHW3"].shape for program in planned]
    assert shapes == [(1, 2, 1, 48, 48, 3), (1, 4, 9, 32, 64, 3)]
    shorter = [program.load.shorten(4.0)[0] for program in planned]
    assert shorter == ["--config.crops=()", "--config.stages[1].crop=9,16,16"]


SIZES = {"tiny": 0.26e6, "s": 51e6, "b": 164e6, "l": 585e6, "xl": 841e6, "3b": 3.04e9, "14b": 13.85e9}


@pytest.mark.parametrize("variant", SIZES)
def test_configs_have_as_many_parameters_as_they_say(variant):
    config = run_config(load(f"{ROOT}/configs/sora.py:{variant}"))
    found = count(denoiser_specs(config.model))
    assert found == pytest.approx(SIZES[variant], rel=0.02)
    if variant.endswith("b") and len(variant) > 1:
        assert found == pytest.approx(float(variant[:-1]) * 1e9, rel=0.02)
    assert f"configs/sora.py:{variant} " in (ROOT / "configs/sora.py").read_text()


def test_tiny_is_taken_by_the_ordinary_command(capsys):
    assert run("train", f"--config={ROOT}/configs/sora.py:tiny", "--workdir=unused", "--dry-run") == 0
    assert "255,488" in capsys.readouterr().out


# --- suggestions ---

SIXTEEN = dict(zip(MESH_AXES, (1, 1, 16, 1, 1), strict=True))
PLAN = Plan("train", "v5e:4x4", 1, 16, SIXTEEN, {}, 0, {}, 0, 16 * GIB, False, 1.0, 1, "tokens")


def unfit(state: float, work: float, **mesh) -> Plan:
    """A plan that does not fit, by GiB of state and of everything else."""
    memory = {"parameters": int(state * GIB), "temporaries": int(work * GIB)}
    return dataclasses.replace(PLAN, memory=memory, needed=int((state + work) * GIB), mesh=PLAN.mesh | mesh)


def suggestion(run_: DenoiserRun, plan: Plan) -> str:
    return suggest(run_, plan, load_of(run_, 1.0, run_.batch))


def test_what_fits_needs_no_change():
    assert suggestion(RUN, dataclasses.replace(PLAN, fits=True)) == ""


def test_suggestions_go_from_cheap_to_dear():
    run_ = dataclasses.replace(model(remat="dots"), batch=32)
    long = dataclasses.replace(run_, model=MODEL, batch=16, packing=PackingConfig(length=4096, slots=1, text_length=32))
    assert "--config.mesh.fsdp=8 " in suggestion(run_, unfit(30, 1, fsdp=2, data=8))
    assert "more chips" in suggestion(
        dataclasses.replace(run_, model=dataclasses.replace(MODEL, heads=1)), unfit(30, 1)
    )
    assert "--config.model.remat=full" in suggestion(run_, unfit(1, 20))
    assert "--config.loop.accumulate=2" in suggestion(dataclasses.replace(run_, model=MODEL), unfit(1, 20))
    said = suggestion(long, unfit(1, 20))
    assert "--config.mesh.sequence=2" in said and "--config.mesh.fsdp=8" in said and "--pack-length=2816" in said
    sampled = dataclasses.replace(unfit(1, 20), what="sample")
    assert "--config.mesh.sequence=2" in suggestion(long, sampled) and "batch" not in suggestion(long, sampled)
    single = dataclasses.replace(run_, model=dataclasses.replace(MODEL, heads=1), batch=16)
    assert suggestion(single, unfit(14.9, 1.2)).startswith("Try ")  # the state alone would fit
    crowded = dataclasses.replace(long, packing=dataclasses.replace(long.packing, text_length=31))
    assert suggestion(crowded, unfit(1, 20)).startswith("Try --pack-length=2816")


def test_the_compilers_complaint_is_read():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (20.50G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert out_of_memory(message) == OutOfMemory(int(20.5 * GIB), int(15.75 * GIB))
    assert out_of_memory("INVALID_ARGUMENT: something else") is None


# --- the report ---


def test_the_report_says_what_binds_and_what_can_be_reached():
    topology = Topology.parse("v5e:4x4")
    peak = topology.chip.peak
    row = network.Traffic("all-gather", ("fsdp",), 12, 3e9, 0.5, 0.0)
    times = {"compute": 2.0, "memory": 1.0, "interconnect": 0.5}
    plan = dataclasses.replace(
        PLAN, fits=True, needed=8 * GIB, flops=2 * peak, bytes=1e12, collectives=(row,), times=times,
        model_flops=16 * 1.5 * peak, memory={"parameters": GIB, "temporaries": 7 * GIB}, units=800,
    )  # fmt: skip
    assert plan.binding == "compute" and plan.ratio == pytest.approx(2 / 1.5)
    assert plan.utilisation(peak) == pytest.approx((1.5 / 2, 1.5 / 3.5))
    text = as_text(plan, topology)
    for said in (
        "fits, 8.00 of 16.00 GiB",
        "compute binds",
        "at most 75%",
        "43% if nothing",
        "400 tokens a second",
        "1.333x",
    ):
        assert said in text, text
    assert re.search(r"all-gather +fsdp +12 x +3 GB +500 ms", text) and re.search("compute +2,000 ms", text)
    second = dataclasses.replace(plan, times=times | {"memory": 0.9999})
    assert re.search(r"memory +1,000 ms", as_text(second, topology))
    tiny = dataclasses.replace(plan, times={"compute": 3.21e-6, "memory": 1e-6}, collectives=())
    text = as_text(tiny, topology)
    assert re.search(r"compute +0\.00321 ms", text) and "collectives: none" in text
    told = json.loads(as_json(plan, topology))
    assert told["binding"] == "compute" and told["utilisation_serial"] == pytest.approx(1.5 / 3.5)


def test_a_report_of_what_does_not_fit_says_by_how_much():
    plan = dataclasses.replace(unfit(1, 20), suggestion="Try less.")
    text = as_text(plan, Topology.parse("v5e:4x4"))
    assert "does NOT fit" in text and "5.00 GiB too much" in text and text.endswith("Try less.")


# --- with libtpu ---


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_the_compiler_leaves_as_much_memory_as_the_table_says(chip):
    from sora_jax.parallel.compile import abstract_on_mesh, compile_program, topology_mesh

    topology = Topology.parse({"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}[chip])
    mesh = topology_mesh(MeshConfig(), topology)
    huge = abstract_on_mesh(jax.ShapeDtypeStruct((2**30, 128), jnp.float32), mesh)
    found = compile_program(jax.jit(lambda x: x + 1), (huge,), mesh)
    assert found.usable == CHIPS[chip].usable and found.needed == 2 * 2**30 * 128 * 4


@needs_libtpu
def test_slices_are_the_outermost_axis_and_axes_may_share_a_row_of_chips():
    from sora_jax.parallel.compile import topology_mesh

    mesh = topology_mesh(MeshConfig(data=1, fsdp=8, tensor=2), Topology.parse("v5e:4x4", slices=2))
    assert tuple(mesh.shape.values()) == (2, 1, 8, 1, 2)
    for number in range(2):
        assert {device.slice_index for device in mesh.devices[number].flat} == {number}
    assert network.links(("fsdp",), mesh, CHIPS["v5e"]) == 2 and network.links(("tensor",), mesh, CHIPS["v5e"]) == 1


@needs_libtpu
def test_a_step_compiled_for_a_tpu_is_planned_and_gathers_nothing_forbidden(monkeypatch):
    from sora_jax.parallel.compile import compile_program, topology_mesh
    from sora_jax.plan import report

    topology = Topology.parse("v5e:2x2")
    run_ = dataclasses.replace(model(attention="dense", text=None), mesh=MeshConfig(data=1, fsdp=4))
    mesh = topology_mesh(run_.mesh, topology)
    program = train_denoiser(for_accelerator(run_), mesh)
    compiled = compile_program(program.function, program.arguments, mesh)
    assert forbidden(compiled.as_text(), mesh, run_) == []
    monkeypatch.setattr(report, "compile_program", lambda *_: compiled)
    plan = report.make_plan(DENOISER, run_, "train", topology)
    assert plan.fits and plan.chips == 4 and sum(plan.memory.values()) == plan.needed
    specs = jax.tree.leaves(denoiser_specs(run_.model), is_leaf=lambda x: isinstance(x, ParamSpec))
    # Four bytes each; what has an axis "embed" is split over four chips, the rest is whole on each.
    expected = sum(4 * math.prod(spec.shape) // (4 if "embed" in spec.axes else 1) for spec in specs)
    assert plan.memory["parameters"] == expected
    assert plan.memory["optimizer"] == pytest.approx(2 * plan.memory["parameters"], rel=0.01)
    assert {row.kind for row in plan.collectives} & {"all-reduce", "reduce-scatter"} and plan.binding in plan.times
    assert 1.3 < plan.ratio <= 1.36


@needs_libtpu
def test_a_sampler_compiled_for_a_tpu_is_planned():
    """Its grid of times is computed while it is traced, on this machine, for devices that cannot compute."""
    from sora_jax.plan.report import make_plan

    run_ = dataclasses.replace(model(attention="dense", text=None), sampling=SamplingConfig(steps="3"))
    plan = make_plan(DENOISER, run_, "sample", Topology.parse("v5e:2x2"))
    assert plan.fits and 1.0 <= plan.ratio < 1.1
