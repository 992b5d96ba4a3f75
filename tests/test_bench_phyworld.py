"""`sora-jax bench phyworld`: from nothing to a row among the published ones, and on where it stopped."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures_runs import one_device

from sora_jax import cli
from sora_jax.benchmarks import phyworld as bench
from sora_jax.benchmarks.phyworld import PhyworldBench, measured, predict_clips, prepared
from sora_jax.benchmarks.phyworld_table import FLOORS, PUBLISHED, Row, published_rows, table
from sora_jax.config import from_dict, load
from sora_jax.data.feeding.tokenizer import NoText
from sora_jax.data.packing.packs import token_counts
from sora_jax.data.storing.drawn import DrawnClips
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.errors import UserError
from sora_jax.generate.run import load_run
from sora_jax.train.denoiser import denoiser_job
from sora_jax.worlds import HELD_OUT
from sora_jax.worlds.phyworld import SCENARIOS, PhyworldConfig, draw
from sora_jax.worlds.phyworld_error import measure, summarise

CONFIG = Path(__file__).parents[1] / "configs" / "phyworld.py"


def call(folder: Path, *words: str) -> int:
    with one_device():
        return cli.main(["bench", "phyworld", f"--config={CONFIG}:tiny", f"--workdir={folder}", *words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run the benchmark in its smallest form."""
    folder = tmp_path_factory.mktemp("phyworld")
    assert call(folder) == 0
    return folder


def test_all_stages_leave_their_results(folder):
    result = json.loads((folder / "result.json").read_text())
    assert result["scenario"] == "uniform" and result["step"] == 4
    assert set(result["kinds"]) == {"in", "velocity", "radius", "both"}
    assert all(kind["clips"] == 4 for kind in result["kinds"].values())
    steps = [point["step"] for point in result["curve"]]
    assert steps == sorted(steps) and len(steps) > 1 and steps[-1] == 4
    assert [point["flops"] / point["step"] for point in result["curve"]] == [result["flops"] / 4] * len(steps)
    for name in ("error_against_flops.png", "clips.png"):
        assert (folder / name).stat().st_size > 1000


def test_a_second_call_goes_on_where_the_first_stopped(folder, monkeypatch, capsys):
    result, kept = (folder / "result.json").read_text(), (folder / "measured" / "step_4" / "in.json").read_bytes()
    whole = json.loads((folder / "measured" / "step_4" / "both.json").read_text())
    (folder / "measured" / "step_4" / "both.json").write_text(json.dumps(whole | {"errors": whole["errors"][:1]}))
    predicted = []

    def watched(run, world, indices):
        predicted.append(indices)
        return predict_clips(run, world, indices)

    monkeypatch.setattr(bench, "predict_clips", watched)
    assert call(folder, "--json") == 0
    assert predicted.count([HELD_OUT + i for i in range(4)]) == 1  # of one kind alone; others are of the picture
    assert (folder / "result.json").read_text() == result
    again = json.loads((folder / "measured" / "step_4" / "both.json").read_text())
    np.testing.assert_equal(again, whole)
    assert (folder / "measured" / "step_4" / "in.json").read_bytes() == kept
    printed = json.loads(capsys.readouterr().out)
    assert printed["flops"] == json.loads(result)["flops"]


def test_what_is_measured_counts_for_the_same_world_and_sampler_alone(folder, tmp_path, monkeypatch):
    config, out = from_dict(PhyworldBench, load(f"{CONFIG}:tiny")), tmp_path / "in.json"
    with one_device():
        run = load_run(folder / "denoiser")
    predicted = []
    monkeypatch.setattr(bench, "predict_clips", lambda _, world, indices: predicted.append(indices) or [
        draw(world, index) for index in indices
    ])  # fmt: skip
    more = dataclasses.replace(run.config, sampling=dataclasses.replace(run.config.sampling, steps="2"))
    for again, world, calls in (
        (run, config.world, 1),
        (run, config.world, 1),
        (dataclasses.replace(run, config=more), config.world, 2),
        (dataclasses.replace(run, config=more), dataclasses.replace(config.world, ranges="both"), 3),
    ):
        measured(again, world, 2, out)
        assert len(predicted) == calls


def test_the_loss_of_its_held_out_clips_is_measured_without_a_latent_cache(folder, capsys):
    capsys.readouterr()
    with one_device():
        assert cli.main(["evaluate", str(folder / "denoiser"), "--metrics=loss", "--count=4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["columns"]["model"]["loss"]["loss"] < 10


def test_what_is_given_stays_and_the_rest_is_the_models(folder):
    config = from_dict(PhyworldBench, load(f"{CONFIG}:tiny"))
    indices = [HELD_OUT, HELD_OUT + 1]
    with one_device():
        run = load_run(folder / "denoiser")
        clips = predict_clips(run, config.world, indices)
        again = predict_clips(run, config.world, indices)
    for index, clip in zip(indices, clips, strict=True):
        true = draw(config.world, index)
        assert clip.shape == true.shape and clip.dtype == np.uint8
        np.testing.assert_array_equal(clip[:3], true[:3])
        assert not np.array_equal(clip[3:], true[3:])
    np.testing.assert_array_equal(again, clips)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_perfect_model_has_the_error_of_true_clips(scenario, tmp_path, monkeypatch):
    world = PhyworldConfig(scenario=scenario, size=48)
    monkeypatch.setattr(bench, "predict_clips", lambda run, world, indices: [draw(world, index) for index in indices])
    run = SimpleNamespace(config=SimpleNamespace(sampling=SamplingConfig()))
    found = summarise(measured(run, world, 6, tmp_path / "in.json").values())
    true = summarise(measure(world, HELD_OUT + i, draw(world, HELD_OUT + i)) for i in range(6))
    assert found == true and found.unbiased < 0.003


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--scenario=parabola"], "--config.world.scenario is 'parabola'; that run has learnt one with 'uniform'"),
        (["--size=24"], "--config.world.size is 24; that run has learnt one with 16"),
        ([f"--config={CONFIG}:latent"], "the run there learns pixels and this config latents"),
    ],
)
def test_a_folder_with_another_world_is_refused(folder, capsys, words, sentence):
    before = sorted(folder.rglob("*"))
    assert call(folder, *words) == 2
    told = capsys.readouterr().err
    assert sentence in told and "take another" in told
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("zooms", [(), (8,)])
def test_packs_are_filled_by_whole_clips(zooms):
    config = from_dict(PhyworldBench, load(f"{CONFIG}:tiny", [f"world.zooms={zooms}", "run.batch=8"]))
    options = prepared(config, Path("unused"))
    cache = DrawnClips(options.drawn, "")
    batch, _ = next(denoiser_job(options, cache, NoText()).batches(0, None))
    lengths = token_counts(batch)
    sizes = {3 * (size // 8) ** 2 for size in (16, *zooms)}  # three rows of tokens
    assert set(lengths[lengths > 0]) == sizes
    assert lengths.sum() == 8 * options.packing.length if not zooms else lengths.sum() > 7 * options.packing.length
    held_out = [cache[index].shape[1] for index in range(config.clips, len(cache))]
    assert held_out == [16] * len(held_out)


def test_the_table_has_the_published_rows_and_one_more():
    for scenario in SCENARIOS:
        own = Row("this run", "30K", 5e14, 0.0123, 0.3, 0.004, 0.29)
        lines = table([*published_rows(scenario), own]).split("\n")
        assert len(lines) == 1 + 2 + 9 + 1
        for levels in PUBLISHED[scenario].values():
            for inside, outside in levels.values():
                assert any(f"{inside:.4f}" in line and f"{outside:.4f}" in line for line in lines)
                assert FLOORS[scenario][0] < inside < outside
        assert "0.0123" in lines[-1] and "0.500" in lines[-1]


def test_scenarios_sizes_and_mistakes_are_those_of_the_options(tmp_path, capsys):
    config = from_dict(PhyworldBench, load(f"{CONFIG}:collision"))
    assert config.world.scenario == "collision" and len(config.kinds) == 7
    assert load(bench.default_config("collision")) == load(f"{CONFIG}:collision")
    assert load(bench.default_config("pendulum")) == load(bench.default_config()) == load(str(CONFIG))
    assert config.autoencoder and config.run.model.head_hidden  # latents; those of pixels are drawn, not built
    config = from_dict(PhyworldBench, load(f"{CONFIG}:parabola"))
    larger = dataclasses.replace(config, world=dataclasses.replace(config.world, size=2 * config.world.size))
    assert prepared(larger, Path("unused")).packing.length == 4 * prepared(config, Path("unused")).packing.length
    for words, sentence in (
        (["--scenario=pendulum"], "uniform"),
        (["--size=33"], "33"),
        (["--config.count=0"], "count is 0; it must be at least 1"),
        (["--config.run.diffusion.given.first_frames=2"], "it must be 3"),
    ):
        assert call(tmp_path, *words) == 2
        assert sentence in capsys.readouterr().err
    with pytest.raises(UserError, match="world.frames is 3"):
        PhyworldBench(world=PhyworldConfig(frames=3))
