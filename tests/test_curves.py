"""Curves of metrics: what is drawn is what was reported."""

import json

import numpy as np
import pytest

from sora_jax import cli
from sora_jax.evaluate import curves
from sora_jax.files import as_path, write_json


def write_run(folder, slope: float, **more):
    """Reports of 60 steps whose loss falls on a line; every tenth has a held-out loss, 0.1 above."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(1, 61):
        loss = 2 - slope * step
        row = {"step": step, "loss": loss, "gradient_norm": 0.5, "learning_rate": 1e-3, "seconds/step": 2.0 * step}
        row |= {f"loss_by_noise/{i}": None if i == 3 else loss + i for i in range(10)}
        if step % 10 == 0:
            row |= {"held_out/loss": loss + 0.1} | {f"held_out/by_noise/{i}": loss + i + 0.1 for i in range(10)}
            row |= {f"held_out/by_size/{size}": loss + 0.1 for size in ("16x24", "8x8")}
        rows.append(row | more)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, to look into."""
    kept, save = [], curves._save
    monkeypatch.setattr(curves, "_save", lambda figure, out: (kept.append(figure), save(figure, out)))
    return kept


def lines_of(figure) -> dict:
    """Return the labelled lines of each panel, as (steps, values)."""
    panels = [panel for panel in figure.axes if panel.get_title()]
    named = lambda panel: [line for line in panel.lines if not line.get_label().startswith("_")]  # noqa: E731
    return {p.get_title(): {line.get_label(): line.get_xydata().T for line in named(p)} for p in panels}


def test_a_run_is_drawn_as_it_was_reported(tmp_path, figures, capsys):
    run = write_run(tmp_path / "a", 0.01)
    assert cli.main(["curves", str(run)]) == 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    panels = lines_of(figures[0])
    wanted = {"loss", "loss by noise level", "held-out loss by size", "gradient norm", "learning rate"}
    assert panels.keys() == wanted
    steps, loss = panels["loss"]["loss"]
    np.testing.assert_allclose(loss, 2 - 0.01 * steps)  # a straight line is smooth
    steps, held_out = panels["loss"]["held_out/loss"]
    np.testing.assert_array_equal(steps, range(10, 61, 10))
    np.testing.assert_allclose(held_out, 2.1 - 0.01 * steps)
    levels, by_noise = panels["loss by noise level"]["training"]
    np.testing.assert_allclose(levels, [0.05, 0.15, 0.25, *np.arange(0.45, 1, 0.1)])  # level 3 has no token
    np.testing.assert_allclose(by_noise, 2 - 0.01 * 57.5 + levels * 10 - 0.5)  # the mean of the last six reports
    np.testing.assert_allclose(panels["loss by noise level"]["held out"][1], 1.5 + np.arange(10))
    assert list(panels["held-out loss by size"]) == ["8x8", "16x24"]
    header, row, where = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["run", "step", "minutes", "loss"] and where == str(run / "curves.png")
    assert row.split() == [str(run), "60", "2.0", "1.4", "1.5", "0.5", "0.001"]


def test_several_runs_share_a_panel_for_each_metric(tmp_path, figures, capsys):
    runs = [write_run(tmp_path / name, slope) for name, slope in (("a", 0.01), ("b", 0.02))]
    out = tmp_path / "both.svg"
    words = [*map(str, runs), "--metrics=loss,held_out/by_size", f"--out={out}", "--json"]
    assert cli.main(["curves", *words]) == 0 and out.exists()
    panels = lines_of(figures[0])
    assert panels.keys() == {"loss", "held_out/by_size"} and len(panels["held_out/by_size"]) == 4
    for run, slope in zip(runs, (0.01, 0.02), strict=True):
        np.testing.assert_allclose(panels["loss"][str(run)][1][-1], 2 - slope * 60)
    found = json.loads(capsys.readouterr().out)
    assert [each["loss"] for each in found] == pytest.approx([1.4, 0.8]) and found[0]["held_out/by_noise/0"] == 1.5


@pytest.mark.parametrize(
    "words, said",
    [
        (["{run}", "--metrics=los"], "--metrics is 'los'; no run reports 'los'; did you mean loss?"),
        (["{run}", "--out=a.txt"], "the ending of --out is 'txt'; allowed: "),
        (["{empty}"], "there is no report in its metrics.jsonl; it must be a run folder that has trained"),
        (["{whole}"], "a run folder that has trained; did you mean {whole}/transformer?"),
        (["{staged}"], "there is no report in its metrics.jsonl: give its stages, {staged}/stage_1"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, words, said, capsys):
    write_run(tmp_path / "run", 0.01)
    write_run(tmp_path / "staged" / "stage_1", 0.01)
    (tmp_path / "empty").mkdir()
    write_json(tmp_path / "whole" / "transformer" / "config.json", {})
    names = {name: as_path(tmp_path / name) for name in ("run", "empty", "staged", "whole")}
    assert cli.main(["curves", *(word.format(**names) for word in words)]) == 2
    assert said.format(**names) in capsys.readouterr().err


def test_a_smooth_curve_keeps_lines_and_halves_noise():
    line = np.linspace(3, 1, 200)
    np.testing.assert_allclose(curves.smooth(line), line)
    noise = np.random.default_rng(0).standard_normal(200)
    found = curves.smooth(noise)
    assert found[20:-20].std() < 0.5 * noise.std() and (found[0], found[-1]) == (noise[0], noise[-1])
