"""Packs that are half empty say which limit leaves them so, and what would fill them."""

import re

import numpy as np
import pytest
from fixtures_caches import clip_row, write_cache
from fixtures_runs import TINY, chain, run  # noqa: F401

from sora_jax.data.building.inspect import Training, inspect, plan_fill
from sora_jax.data.feeding.pipeline import PackedBatches
from sora_jax.data.feeding.tokenizer import NoText, TokenizerConfig, train
from sora_jax.data.packing.advice import advise
from sora_jax.data.packing.packs import PackingConfig
from sora_jax.data.packing.planning import plan
from sora_jax.data.storing.latents import LatentCache
from sora_jax.errors import UserError

RNG = np.random.default_rng(0)
SMALL = RNG.choice([6, 9, 12, 18], 2000)  # the clips of a small world, in packs of 384 tokens
SHORT, WORDY = RNG.integers(4, 8, 2000), RNG.integers(15, 30, 2000)


def padding(lengths, texts, sizes: PackingConfig) -> float:
    packs = plan(1, 0, lengths, texts, sizes)
    return 1 - lengths.sum() / (len(packs) * sizes.length)


@pytest.mark.parametrize(
    "lengths, texts, sizes, limits",
    [
        (SMALL, SHORT, PackingConfig(384, 16, 256), ["slots"]),
        (np.repeat([3, 120], [1500, 500]), np.ones(2000, int), PackingConfig(384, 4, 256), ["slots"]),
        (SMALL, WORDY, PackingConfig(384, 64, 256), ["text_length"]),
        (SMALL, WORDY, PackingConfig(384, 16, 256), ["slots", "text_length"]),
        (np.full(2000, 150), SHORT, PackingConfig(256, 16, 256), ["length"]),
    ],
)
def test_the_advice_is_followed_and_fills_the_packs(lengths, texts, sizes, limits):
    before, told = padding(lengths, texts, sizes), advise(lengths, texts, sizes)
    stated, promise = told.split("; ")
    assert re.findall(r"packing\.(\w+) = ", stated) == limits
    changes = {name: int(value) for name, value in re.findall(r"--config\.packing\.(\w+)=(\d+)", promise)}
    assert set(limits) <= set(changes)
    after = padding(lengths, texts, PackingConfig(**(vars(sizes) | changes)))
    assert after < before / 2 and before > 0.15
    if "length" not in limits:  # then no other number of slots or text tokens leaves much less
        assert after < padding(lengths, texts, PackingConfig(sizes.length, 400, 10**5)) + 0.03
    assert after == pytest.approx(int(re.search(r"leave (\d+)%", promise)[1]) / 100, abs=0.02)


@pytest.mark.parametrize(
    "lengths, texts, sizes",
    [
        (SMALL, SHORT, PackingConfig(128, 16, 256)),  # full
        (np.array([30, 30, 30]), np.ones(3, int), PackingConfig(256, 16, 256)),  # there are no more clips
    ],
)
def test_full_packs_and_few_clips_need_no_advice(lengths, texts, sizes):
    assert advise(lengths, texts, sizes) == ""


def test_the_start_of_a_training_says_it(tmp_path):
    """1,200 clips of 4 tokens, packs of 256 with 16 slots: three quarters are padding."""
    rows = [clip_row(n, (1, 4, 4), {"original": "a dog"}) for n in range(1200)]
    cache = write_cache(tmp_path / "cache", rows, each=600)
    config = PackingConfig(length=256, slots=16, text_length=640, patch=(1, 2, 2))
    tokenizer = train([], TokenizerConfig(kind="bytes", max_tokens=40))
    report = PackedBatches(cache, tokenizer, config, 4, 0).report()
    assert report.padding == pytest.approx(0.75)
    line, advice = str(report).splitlines()
    assert "padding 75.00%" in line
    assert advice == "padding 75%: packing.slots = 16 is the limit; --config.packing.slots=64 would leave 1% padding"
    # A model without text has as many text tokens as slots: they are no limit of their own.
    untexted = PackingConfig(length=256, slots=16, text_length=16, patch=(1, 2, 2))
    assert str(PackedBatches(cache, NoText(), untexted, 4, 0).report()).splitlines()[1] == advice


def test_inspect_counts_with_the_slots_of_training():
    found = plan_fill(SMALL, 384)
    assert found["slots"] == PackingConfig().slots == 16
    in_training = 1 - padding(SMALL, SHORT, PackingConfig(384, 16, 10**6))
    assert in_training < 0.6 and found["fill"] == pytest.approx(in_training, abs=0.01)
    assert found["advice"].startswith("packing.slots = 16 is the limit; --config.packing.slots=")
    assert plan_fill(SMALL, 384, 64)["fill"] > 0.98 and plan_fill(SMALL, 384, 64)["advice"] == ""
    with pytest.raises(UserError, match="--slots is 0; it must be at least 1"):
        plan_fill(SMALL, 384, 0)


def test_inspect_counts_the_packs_that_a_training_makes(chain, tmp_path, capsys):  # noqa: F811
    """As a dry run of it counts them (tests/test_cli.py); then with captions that fill the text of a pack each."""
    assert run("data", "inspect", chain.dataset, f"--config={TINY}") == 0
    assert f"75.0% of 2 packs of 48 tokens and at most 4 clips, as {TINY} makes them" in capsys.readouterr().out
    packing, tokens = PackingConfig(48, 4, 12, (1, 2, 2)), TokenizerConfig(kind="bytes", max_tokens=12)
    found = inspect(chain.dataset, training=Training("", packing, tokens, "train")).summary["fill"]
    batches = PackedBatches(LatentCache(chain.latents), train([], tokens), packing, 1, 0)
    assert found["packs"] == batches.report().packs == 5
    fills = []
    for multiple in ((1, 1), (8, 8)):  # the second as of a network that halves resolutions: clips want more room
        packing = PackingConfig(256, 4, 60, (1, 2, 2), multiple=multiple)
        found = inspect(chain.dataset, training=Training("", packing, tokens, "train")).summary["fill"]
        report = PackedBatches(LatentCache(chain.latents), train([], tokens), packing, 1, 0).report()
        assert (found["packs"], found["fill"]) == (report.packs, pytest.approx(1 - report.padding, abs=1e-3))
        fills.append(found["fill"])
    assert fills[1] < fills[0]
    assert run("data", "inspect", chain.dataset, f"--config={TINY}:autoencoder") == 2
    assert "it must be the config of a transformer" in capsys.readouterr().err
