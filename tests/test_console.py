"""Check what commands write: bars, notes and results, in a terminal and a file, with `--quiet` and `--json`."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from fixtures_runs import TINY, build_options, chain, run, train_options  # noqa: F401

from sora_jax import cli, console
from sora_jax.data.building.inspect import inspect
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.manifest import Dataset


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(console, "HABITS", console.Habits(quiet=True))


def test_a_bar_in_a_file_is_a_line_now_and_then(monkeypatch, capsys):
    """The first state, one every 30 seconds, and the last; no carriage returns."""
    now = 1000.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress(total=200, desc="clips", unit="clip", postfix="compiling") as bar:
        for _ in range(100):
            now += 0.7
            bar.update(2)
            bar.refresh()
    written = capsys.readouterr().err
    states = re.findall(r"^clips: +(\d+)% (\d+)/200 \[.*\]$", written, re.MULTILINE)
    # 0.7 seconds a step: 30 seconds are over after 43 and after 86 steps.
    assert states == [("0", "0"), ("43", "86"), ("86", "172"), ("100", "200")]
    assert written.count("\n") == 4 and "\r" not in written and ", compiling]" in written.splitlines()[0]


def test_a_bar_in_a_terminal_is_drawn_in_place(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(console.sys, "stderr", screen)
    assert list(console.progress([1, 2], "clips")) == [1, 2]
    assert screen.getvalue().count("\r") > 1 and screen.getvalue().count("\n") == 1


def test_quiet_leaves_out_bars_and_notes_but_no_result(quiet, capsys):
    assert list(console.progress(range(3), "clips")) == [0, 1, 2]
    console.note("sampling")
    console.log("1/5")
    console.result({"clips": 3}, "3 clips")
    assert capsys.readouterr() == ("3 clips\n", "")


def test_json_holds_numbers_as_numbers():
    values = {"psnr": np.float32(2.5), "sizes": (np.int64(3), 4), "lost": float("nan"), "out": Path("a/b"), 7: True}
    values |= {"table": np.eye(2), "most": float("inf"), "none": None, "text": "über"}
    assert json.loads(console.as_json(values)) == {
        "psnr": 2.5, "sizes": [3, 4], "lost": None, "out": "a/b", "7": True,
        "table": [[1, 0], [0, 1]], "most": None, "none": None, "text": "über",
    }  # fmt: skip


def told(capsys, *arguments) -> tuple[dict, str]:
    """Return the result of a command with --json, and of the same command without."""
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert run(*arguments) == 0
    return values, capsys.readouterr().out


def test_json_of_inspect_is_what_the_text_says(chain, capsys):  # noqa: F811
    values, text = told(capsys, "data", "inspect", chain.dataset)
    assert values == json.loads(json.dumps(inspect(chain.dataset).summary)) | {"pictures": []}
    tokens = values["tokens"]
    assert re.search(rf"^clips +{values['clips']}$", text, re.MULTILINE) and values["clips"] == 6
    assert f"{tokens['min']} to {tokens['max']}, mean {tokens['mean']:.0f}" in text


def test_json_of_build_and_encode(chain, tmp_path, capsys):  # noqa: F811
    for number, habit in enumerate((["--json"], ["--json", "--quiet"])):
        out = tmp_path / f"data{number}"
        capsys.readouterr()
        assert run(*build_options(chain.clips, out), *habit) == 0
        printed = capsys.readouterr()
        values = json.loads(printed.out)
        assert (values["out"], values["complete"], values["clips"]) == (str(out), True, len(Dataset(out)))
        assert values["refused"] == {} and bool(printed.err) == (number == 0)
    latents = [f"--autoencoder={chain.autoencoder}", f"--data={chain.dataset}", f"--out={tmp_path / 'latents'}"]
    capsys.readouterr()  # the autoencoder may have been trained for this test
    assert run("data", "encode", *latents, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    cache = LatentCache(tmp_path / "latents")
    assert values == {"out": str(tmp_path / "latents"), "complete": True, "clips": len(cache)}


def test_json_of_a_dry_run(chain, tmp_path, capsys):  # noqa: F811
    options = train_options("transformer", tmp_path / "run", f"latents={chain.latents}", "loop.steps=10")
    values, text = told(capsys, *options, "--dry-run")
    assert f"{json.dumps(values['config'], indent=1)}\nparameters\n" in text
    assert values["parameters"]["total"] == int(re.search(r"^  total +([\d,]+)$", text, re.M)[1].replace(",", ""))
    first, data = values["data"]["first_step"], values["data"]
    assert f"{first['tokens']} in the first step, of {first['capacity']} places" in text
    assert data["epochs"] == 10 / data["epoch_steps"] and f"the run has {data['epochs']:.1f} epochs" in text


def test_sample_says_which_files_it_wrote(chain, tmp_path, capsys):  # noqa: F811
    options = ["--prompt=a red square", "--prompt=b", "--steps=1", "--frames=5", "--height=16", "--width=16"]
    run_ = ["sample", f"--workdir={chain.transformer}", *options, f"--out={tmp_path / 'a.gif'}"]
    capsys.readouterr()
    assert run(*run_, "--json") == 0
    printed = capsys.readouterr()
    files = json.loads(printed.out)["files"]
    assert files == [str(tmp_path / name) for name in ("a_000.gif", "a_001.gif")] and all(
        map(Path.exists, map(Path, files))
    )
    assert "sampling" in printed.err
    assert run("--quiet", *run_) == 0  # before the command as well as behind it
    printed = capsys.readouterr()
    assert printed.out.split() == files and "sampling" not in printed.err


def test_habits_end_with_their_command(capsys):
    assert cli.main(["configs", "--json", "--quiet"]) == 0 and console.HABITS == console.Habits(True, True)
    assert cli.main(["configs"]) == 0 and console.HABITS == console.Habits()
    json.loads(capsys.readouterr().out.partition("--config=FILE")[0])
