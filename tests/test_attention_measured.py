"""The choice of a backend by measurement: the fastest that works, where "auto" cannot know."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from sora_jax.data.packing.packs import PackingConfig
from sora_jax.errors import UserError
from sora_jax.nn.attention import BACKENDS, dense_attention
from sora_jax.nn.attention import measured as room
from sora_jax.nn.attention.measured import Load, fastest, mixed_segments
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.train import fastest_attention
from sora_jax.train.denoiser import DenoiserRun
from sora_jax.train.fastest_attention import keep_attention, with_fastest_attention

LOAD = Load(packs=1, length=256, heads=2, head_width=16, dtype="float32")


def slow(q, *rest):
    """Dense attention twenty times over."""
    for _ in range(20):
        q = q + 1e-3 * dense_attention(q, *rest)
    return q


def missing(*_):
    raise RuntimeError("cuDNN is not found\nand much more")


def unfit(*_):
    raise UserError("float32 is not for this kernel")


@pytest.fixture(autouse=True)
def candidates(monkeypatch):
    """candidates(names...): between which a measurement decides."""
    for name, function in {"slow": slow, "missing": missing, "unfit": unfit}.items():
        monkeypatch.setitem(BACKENDS, name, function)
    return lambda *names: monkeypatch.setattr(room, "CANDIDATES", {"cpu": names})


@pytest.mark.parametrize("names, chosen", [
    (("slow", "dense"), "dense"),
    (("dense", "slow"), "dense"),
    (("missing", "slow", "unfit"), "slow"),
])  # fmt: skip
def test_the_fastest_that_works_is_chosen(candidates, names, chosen):
    candidates(*names)
    backend, words = fastest(LOAD)
    assert backend == chosen
    assert all(re.search(rf"{name} (\d+\.\d\d ms|cannot: .*)", words) for name in names)


def test_where_none_works_each_reason_is_told(candidates):
    candidates("missing", "unfit")
    with pytest.raises(UserError, match="missing cannot: cuDNN is not found, unfit cannot: float32 is not for"):
        fastest(LOAD)


def test_dense_attention_is_not_tried_where_its_scores_fill_the_memory(candidates, monkeypatch):
    candidates("dense", "slow")
    monkeypatch.setattr(room, "DENSE_UP_TO", 4 * 2 * 256**2 - 1)
    assert fastest(LOAD)[0] == "slow"


def test_the_first_process_decides(candidates, monkeypatch):
    candidates("dense", "slow")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(room.multihost_utils, "broadcast_one_to_all", lambda mine: np.int32(1))
    assert fastest(LOAD)[0] == "slow"


@pytest.mark.parametrize("length", [64, 100, 4096])
def test_the_pack_that_is_measured_holds_clips_of_many_sizes(length):
    sizes = np.bincount(mixed_segments(length))[1:]
    assert sizes.sum() == length and len(sizes) == 6 and (np.diff(sizes[:-1]) < 0).all()
    assert sizes[0] == -(-length // 2) and (np.diff(mixed_segments(length)) >= 0).all()


def test_a_run_measures_what_a_device_does_and_keeps_the_choice(candidates, monkeypatch, tmp_path):
    config, mesh = (
        DenoiserRun(packing=PackingConfig(length=256), batch=16),
        make_mesh(MeshConfig(data=2, tensor=2, fsdp=2)),
    )
    asked, answers = [], iter(("slow", "dense"))
    monkeypatch.setattr(fastest_attention, "fastest", lambda load: asked.append(load) or (next(answers), ""))

    def here(config=config):
        return with_fastest_attention(config, mesh, tmp_path)

    assert here() is config and not asked  # on a CPU it knows
    candidates("slow", "dense")
    named = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="blockwise"))
    assert here(named) is named and not asked
    assert here().model.attention == "slow" and not list(tmp_path.iterdir())  # sampling leaves nothing behind
    keep_attention(chosen := here(), tmp_path)
    assert here() == chosen and chosen.model.attention == "dense" and config.model.attention == "auto"
    model = config.model
    assert asked == [Load(4, 256, model.heads // 2, model.head_width, "float32")] * 2
