"""`sora-jax bench moving_mnist`: from nothing to a report, its two answers, its costs, what it refuses."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_digits import drawn_digits, write_idx
from fixtures_runs import one_device

from sora_jax.benchmarks import moving_mnist, prediction
from sora_jax.benchmarks.moving_mnist import PUBLISHED, as_published, held_out, read_config, table, world_of
from sora_jax.benchmarks.own_frechet import distances, world_features
from sora_jax.benchmarks.prediction import cost_of, halvings, in_one_step, predict, train_and_measure
from sora_jax.cli import main
from sora_jax.data.packing.packs import patchify
from sora_jax.diffusion.process import linear_flow
from sora_jax.diffusion.sampling import SamplingConfig, sample
from sora_jax.diffusion.solvers import Problem
from sora_jax.diffusion.times import TimesConfig
from sora_jax.errors import UserError
from sora_jax.evaluate.features import FeaturesConfig
from sora_jax.evaluate.prediction_metrics import PredictionQuality
from sora_jax.generate.run import load_run
from sora_jax.models.transformer import forward_flops
from sora_jax.worlds import HELD_OUT
from sora_jax.worlds.table import draw

TINY = "configs/moving_mnist.py:tiny"
SMALL = ["--clips=6", "--sampled=3", "--samples=2", "--frechet=4", "--config.loop.steps=2"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    for name, values in zip(("images-idx3", "labels-idx1"), drawn_digits(20), strict=True):
        write_idx(folder / f"t10k-{name}-ubyte", values)
    return str(folder)


@pytest.fixture(scope="module")
def made(digits, tmp_path_factory):
    """Yield the folder of a benchmark that has run from nothing, and its command; on one device."""
    folder = tmp_path_factory.mktemp("bench")
    few = FeaturesConfig(frames=2, size=16, widths=(8,), features=4, clips=24, steps=2, batch=8)
    command = ["bench", "moving_mnist", f"--digits={digits}", f"--config={TINY}", f"--workdir={folder}", *SMALL]
    with one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving_mnist, "AT_POINT", 2)  # below what is asked for at the end
        patch.setattr(moving_mnist, "world_features", functools.partial(world_features, config=few))
        assert main(command) == 0
        yield folder, command


def test_from_nothing_to_a_report(made):
    folder, _ = made
    report = json.loads((folder / "report.json").read_text())
    assert [point["step"] for point in report["points"]] == [1, 2] and report["given"] == 4
    assert report["train_flops"] == 2 * report["cost"]["step_flops"] > 0
    assert report["points"][-1]["mse"] == report["mean"]["mse"]
    assert report["mean"]["clips"] == 6 and len(report["mean"]["mse_by_frame"]) == 4
    assert np.mean(report["mean"]["mse_by_frame"]) == pytest.approx(report["mean"]["mse"])
    assert set(report["frechet"]) == {"samples", "means", "true"}
    assert report["samples"]["clips"] == 3 and report["samples"]["variance"] > 0
    assert (folder / "flops.png").stat().st_size > 1000 and (folder / "frames.png").stat().st_size > 100


def test_called_again_it_trains_no_further_and_finds_the_same(made, monkeypatch, capsys):
    folder, command = made
    before = json.loads((folder / "report.json").read_text())

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(prediction, "train", refuse)
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == before


def test_published_rows_are_shown_beside_clips_like_theirs_alone(made, digits, capsys):
    _, command = made
    capsys.readouterr()
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "PhyDNet" not in out and "sora_jax" in out
    assert "4 given and 4 predicted: published errors are of other clips and not shown" in out
    usual = read_config(None, [], str(digits))
    assert as_published(usual, 10) and not as_published(usual, 5)
    assert not as_published(read_config(None, ["drawn.world.size=40"], str(digits)), 10)


def test_the_table_has_ours_among_the_published_by_cost(digits):
    quality = PredictionQuality(10, 50.0, 100.0, 0.9, 20.0, (50.0,))
    rows = table(PUBLISHED, cost_of(read_config(TINY, [], str(digits))), 1e12, quality).splitlines()[1:]
    assert rows[0].startswith("sora_jax") and "PhyDNet" in rows[2] and "28.19" in rows[2]
    costs = [float(row.split("G ")[1].split()[0]) for row in rows]
    assert costs == sorted(costs)


def test_given_frames_stay_and_the_mean_is_the_networks_answer_at_pure_noise(made):
    folder, _ = made
    run, given = load_run(folder), 4
    clip = 2 * held_out(run.config, 1)[0] - 1
    seen = []

    def answer(sampling, changed):
        other = clip.copy()
        other[given:] = changed
        return next(iter(predict(run, [other], given, sampling, seed=3)))

    for changed in (0.0, 0.7):  # what is to be predicted is not seen
        seen.append(answer(in_one_step(run.config.sampling), changed))
        np.testing.assert_array_equal(seen[-1][:given], clip[:given])
    np.testing.assert_array_equal(*seen)
    assert np.abs(answer(run.config.sampling, 0.0) - seen[0])[given:].max() > 0
    assert len({latent[given:].tobytes() for latent in predict(run, [clip] * 3, given, run.config.sampling, 3)}) == 3


@pytest.mark.parametrize("prediction_type", ["x0", "velocity"])
def test_one_step_ends_at_the_predicted_clip(prediction_type):
    eps = jax.random.normal(jax.random.key(0), (1, 6, 4))
    x0, rows = jnp.sin(jnp.arange(24.0)).reshape(1, 6, 4), jnp.zeros((1, 6), jnp.int32)
    denoise = lambda x, t: x0 if prediction_type == "x0" else x - x0  # noqa: E731
    problem = Problem(denoise, prediction_type, linear_flow, rows)
    found = sample(in_one_step(SamplingConfig()), TimesConfig(), problem, eps, jnp.full((1, 1), 6))
    np.testing.assert_allclose(found, x0, atol=1e-6)


def test_costs_are_those_of_one_clip_and_of_a_step(digits):
    config = read_config(TINY, (), digits)
    cost, tokens = cost_of(config), len(patchify(np.zeros((8, 40, 40, 1)), config.model.patch))
    assert tokens == config.packing.length
    one = {
        "segments_BL": np.ones((1, tokens), int),
        "row_slots_BR": np.zeros((1, 2), int),
        "clip_ids_BS": np.ones((1, 1), int),
        "grids_BS3": np.array([[[4, 5, 5]]]),
    }
    assert cost.forward_flops == forward_flops(config.model, one)
    assert cost.step_flops == 3 * cost.forward_flops * cost.step_clips and cost.step_clips == config.batch


def test_points_are_measured_once_under_one_schedule(digits, tmp_path, monkeypatch):
    config, calls = read_config(TINY, (), digits), []
    (tmp_path / "time.json").write_text('{"step": 4, "seconds": {"compile": 9.0, "data": 1.0, "step": 2.0}}')
    monkeypatch.setattr(prediction, "train", lambda config, folder: calls.append(config))
    monkeypatch.setattr(prediction, "load_run", lambda folder: calls[-1].loop.steps)
    first = train_and_measure(config, tmp_path, [2, 4], lambda run: {"error": 1 / run})
    again = train_and_measure(config, tmp_path, [2, 4, 8], lambda run: {"error": 1 / run})
    assert {point["seconds"] for point in again} == {3.0}
    assert again[:2] == first and [point["error"] for point in again] == [1 / 2, 1 / 4, 1 / 8]
    assert [own.loop.steps for own in calls] == [2, 4, 8]
    assert {own.optim.decay_steps for own in calls} == {config.loop.steps}
    assert halvings(8, 3) == [2, 4, 8] and halvings(3, 9) == [1, 2, 3]


def test_frechet_distances_tell_other_frames_and_not_others_of_the_same(digits, tmp_path):
    """Features are learnt once, from the words of captions; true clips are nearer to true ones than their negatives."""
    world, few = (
        world_of(read_config(TINY, (), digits)),
        FeaturesConfig(2, 16, (8, 16), 8, clips=96, steps=20, batch=32),
    )
    classifier = world_features(world, 4, tmp_path, few)
    assert {"word seven", "word eight"} <= set(classifier.classes)
    assert world_features(world, 4, tmp_path, few).digest == classifier.digest
    true = [draw(world, HELD_OUT + index)[4:] for index in range(80)]
    found = distances(classifier, true[:40], {"true": true[40:], "inverted": [255 - clip for clip in true[40:]]})
    assert found["inverted"].value > 3 * found["true"].value and found["inverted"].low > found["true"].value


def test_multiply_adds_of_predformer_are_those_of_its_architecture():
    """24 gated blocks of width 256 (attention 4 D^2, MLP 12 D^2) over 640 tokens; ends add less than 1 %."""
    products, full = 640 * 24 * 16 * 256**2, 2 * 640 * 640 * 256
    in_space, in_time = 2 * 640 * 64 * 256, 2 * 640 * 10 * 256
    wanted = {"full attention": products + 24 * full, "TSST": products + 12 * (in_space + in_time)}
    for name, count in wanted.items():
        row = next(row for row in PUBLISHED if row.method.endswith(name))
        assert row.gmacs == pytest.approx(count / 1e9, rel=0.01)
    convmixer = next(row for row in PUBLISHED if (row.method, row.epochs) == ("ConvMixer", 200))
    assert convmixer.train_flops == pytest.approx(6.6e16)


def test_mistakes_are_told(digits, tmp_path, capsys):
    bench = ["bench", "moving_mnist", f"--workdir={tmp_path / 'x'}", f"--config={TINY}"]
    for options, message in (
        ([], "--digits is not given; it must be a folder with idx files of MNIST"),
        ([f"--digits={digits}", "--samples=1"], "--samples is 1; it must be at least 2"),
        ([f"--digits={digits}", "--clips=0"], "--clips is 0; it must be at least 1"),
        ([f"--digits={digits}", "--frechet=1"], "--frechet is 1; it must be 0 (none), or from 2 to"),
        (
            [f"--digits={digits}", "--clips=4", "--frechet=5"],
            "it must be 0 (none), or from 2 to --clips, 4",
        ),
        (
            [f"--digits={digits}", "--clips=4", "--frechet=0", "--sampled=5"],
            "--sampled is 5; it must be at most --clips, 4",
        ),
        (
            [f"--digits={digits}", "--config.diffusion.given.first_frames=0"],
            "config.diffusion.given.first is 1 and first_frames 0; a benchmark of prediction needs 1",
        ),
        ([f"--digits={digits}", "--config.diffusion.given.first_frames=4"], "8 frames are given"),
    ):
        assert main([*bench, *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="--config draws another world"):
        moving_mnist.read_config("configs/transformer.py:S", (), digits)


def test_without_labels_features_are_refused_before_the_training(tmp_path, capsys):
    write_idx(tmp_path / "images", drawn_digits(20)[0])
    digits = str(tmp_path / "images")
    bench = ["bench", "moving_mnist", f"--workdir={tmp_path / 'x'}", f"--config={TINY}", f"--digits={digits}"]
    assert main([*bench, "--frechet=4"]) == 2
    assert "--frechet is 4; it must be 0, as there are no labels" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    moving_mnist.check_frechet(read_config(TINY, (), digits), moving_mnist.Options(frechet=0))
