"""The doctor: a healthy run has no error, and each illness is found by name. Nothing is written."""

import dataclasses
import json
import shutil
import types

import jax
import pytest
from fixtures_runs import chain, one_device, run  # noqa: F401

from sora_jax import cli
from sora_jax.config import read_json, to_dict
from sora_jax.doctor import machine
from sora_jax.doctor import run as doctor
from sora_jax.doctor.finding import ERROR, OK, WARNING
from sora_jax.files import write_json
from sora_jax.kinds import stored_config
from sora_jax.parallel.mesh import make_mesh
from sora_jax.train.checkpoint import Checkpoints


@pytest.fixture
def copy(chain, tmp_path):  # noqa: F811
    return shutil.copytree(chain.transformer, tmp_path / "run")


def opened(folder) -> doctor.Patient:
    found = doctor._opened(folder)
    assert isinstance(found, doctor.Patient)
    return found


def levels(findings) -> list:
    return [(finding.level, finding.topic) for finding in findings]


def files_of(folder) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def change(folder, **fields) -> None:
    """Another config in the folder than it was trained with."""
    values = read_json(folder / "config.json")
    for path, value in fields.items():
        group, _, name = path.rpartition("__")
        (values[group] if group else values)[name] = value
    write_json(folder / "config.json", to_dict(stored_config(values)))


def test_a_healthy_run_has_no_error_and_nothing_is_written(copy, capsys):
    before = files_of(copy)
    assert run("doctor", copy, "--json") == 0
    findings = json.loads(capsys.readouterr().out)
    assert {finding["level"] for finding in findings} <= {OK, WARNING}
    topics = [finding["topic"] for finding in findings if finding["level"] == OK]
    for topic in ("config", "lock", "step", "checkpoints", "weights", "autoencoder", "data", "gradients"):
        assert topic in topics, findings
    said = next(finding["text"] for finding in findings if finding["topic"] == "gradients")
    assert all(name in said for name in ("blocks", "text")), said
    assert files_of(copy) == before


def test_a_damaged_checkpoint_is_found_and_the_one_before_is_examined(copy, capsys):
    largest = max((p for p in (copy / "checkpoints/6/state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    patient = opened(copy)
    with one_device(), jax.set_mesh(patient.mesh):
        findings = list(doctor._checkpoints(patient))
    assert levels(findings) == [(ERROR, "checkpoints"), (OK, "checkpoints")]
    assert "checkpoint 6 is damaged" in findings[0].text and int(patient.state.step) == 3


def test_weights_that_are_not_finite_are_named(copy):
    patient = opened(copy)
    with jax.set_mesh(patient.mesh):
        list(doctor._checkpoints(patient))
        healthy = patient.state
        assert levels(doctor._weights(patient)) == [(OK, "weights")]
        spoilt = jax.tree.map(lambda x: x, healthy.params)
        spoilt["model"]["text"]["table"] = spoilt["model"]["text"]["table"].at[0].set(float("nan"))
        with Checkpoints(copy / "checkpoints", 3) as checkpoints:
            notes = {"config": read_json(copy / "config.json"), "step": 7}
            checkpoints.save(7, dataclasses.replace(healthy, params=spoilt, step=healthy.step + 1), notes)
        patient = opened(copy)
        list(doctor._checkpoints(patient))
        (finding,) = doctor._weights(patient)
    assert finding.level == ERROR and "parameters are not finite, in model/text/table" in finding.text


def test_the_cache_of_another_autoencoder_is_an_error_of_the_data(chain, copy, tmp_path, capsys):  # noqa: F811
    cache = shutil.copytree(chain.latents, tmp_path / "latents")
    write_json(cache / "cache.json", read_json(cache / "cache.json") | {"fingerprint": "0" * 64})
    change(copy, latents=str(cache))
    patient = opened(copy)
    findings = list(doctor.guarded("data", lambda: doctor._data(patient)))
    assert levels(findings) == [(ERROR, "data")] and "was made by another autoencoder" in findings[0].text
    assert patient.job is None and not list(doctor._packs(patient))


def test_packs_that_are_half_empty_come_with_the_limit(copy):
    change(copy, packing__slots=1)
    patient = opened(copy)
    with one_device():
        patient.mesh = make_mesh(patient.config.mesh)
        assert levels(doctor._data(patient)) == [(OK, "data")]
    (finding,) = doctor._packs(patient)
    assert finding.level == WARNING and "packing.slots = 1 is the limit; --config.packing.slots=" in finding.text


def test_a_run_of_another_number_of_devices_is_examined(copy):
    change(copy, mesh__data=16)
    patient = opened(copy)
    assert patient.mesh.size == 8
    assert levels(doctor._step(patient)) == [(OK, "step")]


def test_stages_that_cannot_be_made_are_a_finding(copy, monkeypatch):
    monkeypatch.setattr(doctor, "saved_steps", lambda folder: 1 / 0)
    monkeypatch.setattr(doctor, "kind_of", lambda config: types.SimpleNamespace(stages=lambda *_: [(copy, config)]))
    assert levels(doctor.examine_run(copy)) == [(ERROR, "config")]


def reports(folder, losses, held_out=()) -> doctor.Patient:
    rows = [{"step": step + 1, "loss": loss} for step, loss in enumerate(losses)]
    for row, value in zip(rows[:: max(1, len(rows) // max(len(held_out), 1))], held_out):
        row["held_out/loss"] = value
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return opened(folder)


@pytest.mark.parametrize(
    "losses, held_out, wanted",
    [
        ([2 - 0.02 * i for i in range(50)], [1.9, 1.5, 1.1], [OK, OK]),
        ([1 + 0.01 * i for i in range(50)], [], [WARNING]),
        ([2 - 0.02 * i for i in range(50)], [1.9, 1.2, 1.4], [OK, WARNING]),
        ([2 - 0.035 * i for i in range(50)], [1.9, 1.5, 1.5], [OK, WARNING]),
        ([1.0, None, 1.0], [], [WARNING, OK]),
        ([], [], [WARNING]),
    ],
    ids=["falls", "rises", "held-out rises", "overfits", "not finite", "none"],
)
def test_losses_are_judged(copy, losses, held_out, wanted):
    patient = reports(copy, losses, held_out)
    found = [finding.level for finding in (*doctor._loss(patient), *doctor._held_out(patient))]
    assert found == wanted


def test_gradients_are_judged_by_the_size_of_parameters():
    alive = {"blocks": (1.0, 10.0), "text": (0.1, 3.0), "out": (0.2, 1.0)}
    assert [f.level for f in doctor._judged(alive)] == [OK]
    ill = alive | {"dead": (0.0, 1.0), "nan": (float("nan"), 1.0), "far": (1e6, 1.0)}
    found = {f.text.partition(":")[0]: f.level for f in doctor._judged(ill)}
    assert found == {"nan": ERROR, "dead": WARNING, "far": WARNING}


def test_an_error_is_an_exit_code_and_no_run_is_one_sentence(copy, tmp_path, capsys):
    (copy / "config.json").write_text("{")
    with pytest.raises(SystemExit) as ended:
        run("doctor", copy)
    assert ended.value.code == 1 and capsys.readouterr().out.startswith("error    config ")
    assert cli.main(["doctor", str(tmp_path / "none")]) == 2
    assert "RUN is " in capsys.readouterr().err
    (tmp_path / "whole" / "transformer").mkdir(parents=True)
    (tmp_path / "whole" / "transformer" / "config.json").write_text("{}")
    assert cli.main(["doctor", str(tmp_path / "whole")]) == 2
    assert f"did you mean {tmp_path / 'whole' / 'transformer'}?" in capsys.readouterr().err


def test_a_machine_is_examined_and_a_package_out_of_range_has_its_command(monkeypatch):
    monkeypatch.setattr(machine, "_sample", lambda: iter(()))
    version = machine.installed_version
    monkeypatch.setattr(machine, "installed_version", lambda name: "9.0" if name == "av" else version(name))
    findings = list(machine.examine_machine())
    wrong = [finding for finding in findings if finding.level == ERROR]
    assert [finding.topic for finding in wrong] == ["versions"]
    assert wrong[0].text.startswith("av is 9.0; it must be >=") and ": pip install 'av>=" in wrong[0].text
    assert sum(finding.topic == "extras" for finding in findings) <= 2  # one line of each kind
    assert {"devices", "memory", "disk", "extras", "codecs", "compute"} <= {finding.topic for finding in findings}
