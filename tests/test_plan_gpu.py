"""Planning for GPUs: what the compiler is told, kernels, data-dependent loops, NVLink; compiled where that can be."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.data.packing.packs import PackingConfig
from sora_jax.kinds.denoiser import DENOISER
from sora_jax.models.transformer import TransformerConfig
from sora_jax.nn.attention import Place, Places, blockwise_attention
from sora_jax.parallel.chips import CHIPS
from sora_jax.parallel.compile import Topology, topology_mesh
from sora_jax.parallel.mesh import MeshConfig
from sora_jax.parallel.rules import MESH_AXES
from sora_jax.plan import hlo, network
from sora_jax.plan.report import make_plan
from sora_jax.train.denoiser import DenoiserRun

GPUS = [chip.name for chip in CHIPS.values() if chip.gpu]
needs_cuda_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="not installed: pip install 'jax[cuda13]'"
)


@pytest.mark.parametrize("name", GPUS)
def test_the_compiler_is_told_what_a_gpu_is(name):
    chip = CHIPS[name]
    text = chip.target_config()
    assert text.count("{") == text.count("}") == 2
    assert f"device_memory_size: {chip.memory} " in text and "cuda_compute_capability { major: " in text
    assert chip.usable == chip.memory * 3 // 4


def test_a_switch_gives_each_gpu_its_whole_link_whatever_the_group():
    chip, sizes = CHIPS["h100"], dict.fromkeys(MESH_AXES, 1) | {"slice": 2, "fsdp": 4, "tensor": 2}
    mesh = type("Node", (), {"shape": sizes})()
    for axes in (("fsdp",), ("tensor",), ("fsdp", "tensor")):
        assert network.links(axes, mesh, chip) == 1

    def seconds(kind, members, axes):
        collective = hlo.Collective(kind, np.arange(members)[None], 800.0, 1, "", "", "f32", ())
        return network.seconds(collective, axes, mesh, chip)

    assert seconds("all-to-all", 4, ("fsdp",)) == (pytest.approx(600 / chip.link), 0)
    inside, between = seconds("all-reduce", 8, ("slice", "fsdp"))
    assert inside == pytest.approx(2 * 600 / chip.link)
    assert between == pytest.approx(2 * 200 / 2 / chip.data_centre)


@pytest.mark.parametrize("target, products", [("fmhaScaleBiasSoftmax", 2), ("fmhaScaleBiasSoftmaxBackward", 5)])
def test_cudnn_does_so_many_products_of_scores_and_width(target, products):
    """Packs, length, heads, width is its layout, which the shapes of operands alone do not tell."""
    told = '{"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"dimensions": ["3", "5", "70", "90"]}}}'
    text = f"""
ENTRY %main (q: bf16[3,70,5,16], k: bf16[3,90,5,16]) -> bf16[3,70,5,16] {{
  %q = bf16[3,70,5,16]{{3,2,1,0}} parameter(0)
  %k = bf16[3,90,5,16]{{3,2,1,0}} parameter(1)
  ROOT %c = bf16[3,70,5,16]{{3,2,1,0}} custom-call(%q, %k), custom_call_target="__cudnn${target}", backend_config={told}
}}
"""
    counted = hlo.count(text, 1)
    assert counted.flops == 2 * products * 3 * 5 * 70 * 90 * 16
    assert counted.bytes == 2 * 3 * 5 * 16 * (70 + 90 + 70)


def test_blocks_that_depend_on_segments_count_as_all_there_are():
    """Four blocks of queries and four of keys: all pairs, twice forward, are the products of one dense attention."""
    x, one = jax.ShapeDtypeStruct((1, 2048, 2, 16), jnp.float32), Place(jax.ShapeDtypeStruct((1, 2048), jnp.int32))
    compiled = jax.jit(lambda x, one: blockwise_attention(x, x, x, Places(one, one), block=512)).lower(x, one).compile()
    attention = 2 * 2 * 2 * 2048**2 * 16
    table = 2 * 4 * 4 * 256  # which blocks share a segment
    assert attention <= hlo.count(compiled.as_text(), 1).flops <= attention + table


@needs_cuda_compiler
@pytest.mark.parametrize("attention", ["auto", "blockwise", "dense"])
def test_a_step_compiled_for_gpus_is_planned(attention):
    model = TransformerConfig(depth=2, width=128, heads=2, latent_channels=4, text=None, attention=attention)
    run = DenoiserRun(
        model=model, batch=8, packing=PackingConfig(length=1024, slots=1), mesh=MeshConfig(data=1, fsdp=-1)
    )
    plan = make_plan(DENOISER, run, "train", Topology.parse("h100:4", slices=2))
    assert plan.model["attention"] == ("cudnn" if attention == "auto" else attention)
    assert plan.fits and plan.chips == 8 and plan.mesh["slice"] == 2 and plan.mesh["fsdp"] == 4
    assert {"slice"} & {axis for row in plan.collectives for axis in row.axes}
    assert 1.0 < plan.ratio < 2.0
    one = dataclasses.replace(run, mesh=MeshConfig(), batch=1)
    assert topology_mesh(one.mesh, Topology.parse("h100:1")).size == 1
