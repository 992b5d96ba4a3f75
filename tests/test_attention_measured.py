"""The choice of a backend by measurement: the fastest that works, where "auto" cannot know."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.data.packing import PackingConfig
from sora_jax.errors import UserError
from sora_jax.nn.attention import BACKENDS, dense_attention
from sora_jax.nn.attention import measured as room
from sora_jax.nn.attention.measured import measured, mixed_segments
from sora_jax.train.denoiser import DenoiserRun, with_fastest_attention

SHAPE = (256, 2, 16, "float32")


def slow(q, *rest):
    """Dense attention twenty times over."""
    for _ in range(20):
        q = q + 1e-3 * dense_attention(q, *rest)
    return q


def missing(*_):
    raise RuntimeError("cuDNN is not found")


def unfit(*_):
    raise UserError("float32 is not for this kernel")


@pytest.fixture(autouse=True)
def backends(monkeypatch):
    room._times.cache_clear()
    for name, function in {"slow": slow, "missing": missing, "unfit": unfit}.items():
        monkeypatch.setitem(BACKENDS, name, function)


@pytest.mark.parametrize("candidates, chosen", [
    (("slow", "dense"), "dense"),
    (("dense", "slow"), "dense"),
    (("missing", "slow", "unfit"), "slow"),
])  # fmt: skip
def test_the_fastest_that_works_is_chosen(monkeypatch, candidates, chosen):
    monkeypatch.setattr(room, "CANDIDATES", {"cpu": candidates})
    assert measured("auto", *SHAPE) == chosen


def test_what_is_named_or_known_is_not_measured(monkeypatch):
    monkeypatch.setattr(room, "_times", lambda *_: pytest.fail("measured"))
    assert measured("auto", *SHAPE) == "auto"  # on a CPU it knows
    monkeypatch.setattr(room, "CANDIDATES", {"cpu": ("slow", "dense")})
    assert measured("blockwise", *SHAPE) == "blockwise"


def test_dense_attention_is_not_tried_where_its_scores_fill_the_memory(monkeypatch):
    monkeypatch.setattr(room, "DENSE_UP_TO", 255)
    monkeypatch.setattr(room, "CANDIDATES", {"cpu": ("dense", "slow")})
    assert measured("auto", *SHAPE) == "slow"


def test_the_first_process_decides(monkeypatch):
    monkeypatch.setattr(room, "CANDIDATES", {"cpu": ("dense", "slow")})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(room.multihost_utils, "broadcast_one_to_all", lambda mine: np.int32(1))
    assert measured("auto", *SHAPE) == "slow"


@pytest.mark.parametrize("length", [64, 100, 4096])
def test_the_pack_that_is_measured_holds_clips_of_many_sizes(length):
    sizes = np.bincount(mixed_segments(length))[1:]
    assert sizes.sum() == length and len(sizes) == 6 and (np.diff(sizes[:-1]) < 0).all()
    assert sizes[0] == -(-length // 2) and jnp.all(jnp.diff(jnp.asarray(mixed_segments(length))) >= 0)


def test_a_run_computes_with_the_choice_and_its_config_keeps_the_word(monkeypatch):
    monkeypatch.setattr(room, "CANDIDATES", {"cpu": ("slow", "dense")})
    config = DenoiserRun(packing=PackingConfig(length=256))
    assert with_fastest_attention(config).model.attention == "dense" and config.model.attention == "auto"
