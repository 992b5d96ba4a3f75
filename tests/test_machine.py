"""Whatever the machine is set to: JAX's own switches, users without a home, installations, Ctrl-C."""

import ast
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_runs import ROOT, TINY, chain, start, train_options  # noqa: F401
from fixtures_toy import toy_job, train
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax import cli, files
from sora_jax.config import load
from sora_jax.config_files import find_config
from sora_jax.diffusion.process import linear_flow
from sora_jax.diffusion.times import TimesConfig, sampling_times
from sora_jax.errors import UserError
from sora_jax.generate.run import load_run
from sora_jax.parallel import settings
from sora_jax.parallel.mesh import make_mesh

SWITCHES = {
    "JAX_DEBUG_NANS": "True",
    "JAX_DEBUG_INFS": "True",
    "JAX_DEFAULT_PRNG_IMPL": "unsafe_rbg",
    "JAX_THREEFRY_PARTITIONABLE": "False",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_ENABLE_X64": "True",
}


def test_a_run_is_the_same_under_all_switches_of_jax(chain, tmp_path, monkeypatch):  # noqa: F811
    for name, value in SWITCHES.items():
        monkeypatch.setenv(name, value)
    options = train_options("transformer", tmp_path / "run", f"latents={chain.latents}", "loop.steps=1")
    process = start(*options)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    found, wanted = (
        json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) for run in (tmp_path / "run", chain.transformer)
    )
    assert found["step"] == wanted["step"] == 1
    for name in ("loss", "gradient_norm", "update_norm"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, err_msg=name)
    bins = [[row.get(f"loss_by_noise/{i}") for i in range(10)] for row in (found, wanted)]
    assert [x is None for x in bins[0]] == [x is None for x in bins[1]] and None in bins[0]


DRAWS = ("uniform", "normal", "truncated_normal", "randint", "bernoulli", "gumbel", "exponential", "categorical")


@pytest.mark.parametrize("path", sorted((ROOT / "sora_jax").rglob("*.py")), ids=lambda path: path.stem)
def test_every_draw_names_its_dtype(path):
    """With that of JAX's default, 64 bits would change the bits that are drawn."""
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        if name.startswith("jax.random.") and name.rpartition(".")[2] in DRAWS:
            given = [ast.unparse(value) for value in [*call.args, *(word.value for word in call.keywords)]]
            assert any(word.startswith(("jnp.float32", "jnp.int32")) for word in given), ast.unparse(call)


def test_a_nan_that_is_hunted_is_found_where_it_is(tmp_path):
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        train(tmp_path, toy_job({2: lambda: {"root": np.zeros(2, np.float32)}}), steps=3)


def test_a_run_without_jit_learns_the_same(tmp_path):
    with jax.disable_jit():
        slow = train(tmp_path / "slow", steps=3)
    quick = train(tmp_path / "quick", steps=3)
    np.testing.assert_allclose(*(state.params["model"]["weight"] for state in (slow, quick)), rtol=1e-5)


def test_times_of_sampling_need_no_jit():
    mesh = make_mesh()
    tokens_BR = jax.device_put(np.full((8, 2), 9, np.int32), NamedSharding(mesh, PartitionSpec(("data",))))
    base_K = jnp.linspace(1.0, 0.0, 5)
    with jax.set_mesh(mesh):
        found = sampling_times(TimesConfig(), base_K, tokens_BR, linear_flow)
    np.testing.assert_array_equal(found, sampling_times(TimesConfig(), base_K, jnp.full((8, 2), 9), linear_flow))


COMMANDS = {
    "train": ["--config=configs/tiny.py", "--workdir=run"],
    "train --dry-run": ["--config=configs/tiny.py", "--workdir=run", "--dry-run"],
    "quickstart": ["--workdir=run"],
    "sample": ["--prompt=a", "--out=a.gif"],
    "calibrate": ["--workdir=run"],
    "evaluate": ["run", "--data=data"],
    "convert": ["--from=dit", "--weights=dit.safetensors", "--out=run"],
    "data encode": ["--autoencoder=run", "--data=data", "--out=latents"],
}


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'gpu'")])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_platform_that_is_not_there_is_one_sentence(command, error, tmp_path, monkeypatch, capsys):
    devices, platforms = jax.devices, jax.config.jax_platforms

    def only_cpu(*arguments):
        if jax.config.jax_platforms != "cpu":
            raise error
        return devices(*arguments)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "devices", only_cpu)
    try:
        jax.config.update("jax_platforms", "gpu")
        assert cli.main([*command.split(), *COMMANDS[command]]) == 2
    finally:
        jax.config.update("jax_platforms", platforms)
    wanted = "sora-jax: JAX_PLATFORMS is 'gpu'; JAX finds no such platform here: it must be cpu, or not be set"
    wanted += f" ({error})\n" if str(error) else "\n"
    assert capsys.readouterr().err == wanted and not list(tmp_path.iterdir())


def test_jax_itself_refuses_a_platform_in_a_way_that_is_caught():
    program = "from sora_jax.parallel.settings import check_platforms; check_platforms()"
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if done.returncode:  # no CUDA here
        assert done.stderr.splitlines()[-1].startswith("sora_jax.errors.UserError: JAX_PLATFORMS is 'cuda'; ")


@pytest.fixture
def homeless(monkeypatch):
    """A user whom the machine does not know, as in a container that is started under another id."""

    def unknown(_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "SORA_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)


def test_a_user_without_a_home_works_without_caches(homeless, tmp_path, monkeypatch, capsys):
    before = jax.config.jax_compilation_cache_dir
    settings.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
    assert "compiled programs are not kept for the next start: SORA_JAX_CACHE is not set" in capsys.readouterr().err
    with pytest.raises(UserError, match="SORA_JAX_CACHE"):
        files.cache_folder()
    monkeypatch.setenv("SORA_JAX_CACHE", str(tmp_path))
    assert files.cache_folder() == tmp_path


def test_a_cache_that_cannot_be_written_is_reported(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SORA_JAX_CACHE", str(tmp_path / "file" / "cache"))
    settings.use_compilation_cache()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "not kept" in said and str(tmp_path / "file") in said


@pytest.mark.parametrize("own", [None, "own"])
def test_python_keeps_compiled_programs_as_commands_do_and_where_the_user_says(own, tmp_path, monkeypatch):
    monkeypatch.setenv("SORA_JAX_CACHE", str(tmp_path / "cache"))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    try:
        jax.config.update("jax_compilation_cache_dir", own)
        load_run("world")
        assert jax.config.jax_compilation_cache_dir == (own or str(tmp_path / "cache"))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


# What pip makes: where packages are, where data files are, and how the package's list names them.
LAYOUTS = {
    "venv or --user": ("lib/python3/site-packages", ".", "../../../"),
    "--target": (".", ".", "../../"),
    "Debian": ("local/lib/python3/dist-packages", "local", "../../../"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_installed_package_finds_its_configs(layout, tmp_path):
    packages, data, listed = LAYOUTS[layout]
    packages, shared = tmp_path / packages, tmp_path / data / "share" / "sora_jax" / "configs"
    shutil.copytree(ROOT / "sora_jax", packages / "sora_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", shared, ignore=shutil.ignore_patterns("__pycache__"))
    record = packages / "sora_jax-0.1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: sora_jax\nVersion: 0.1.0\n")
    (record / "RECORD").write_text(f"{listed}share/sora_jax/configs/tiny.py,,\nsora_jax/config.py,,\n")
    (tmp_path / "elsewhere").mkdir()
    program = "from sora_jax.config_files import *; print(find_config('configs/tiny.py:x')); "
    program += "print(package_config('quickstart.py'))"
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
    )
    assert found.stdout.splitlines() == [f"{shared / 'tiny.py'}:x", str(shared / "quickstart.py")], found.stderr


def test_configs_are_found_away_from_the_checkout_and_those_of_the_folder_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("configs/tiny.py:autoencoder", ["seed=3"]).seed == 3
    assert find_config("configs/tiny.py") == str(ROOT / "configs" / "tiny.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").write_text(TINY.read_text().replace("config.batch = 8", "config.batch = 5"))
    assert load("configs/tiny.py").batch == 5
    for name, near in (("configs/tny.py", "; did you mean configs/tiny.py?"), ("tiny.py", "")):
        with pytest.raises(UserError) as caught:
            load(f"{name}:a")
        message = str(caught.value)
        assert message.startswith(f"--config is '{name}:a'; there is no file '{name}' in {tmp_path}; "), message
        assert str(ROOT / "configs") in message and "configs/quickstart.py" in message and message.endswith(near)


# A command that is interrupted, in a process that would then die as JAX does after an interrupted compilation.
INTERRUPTED = """
import atexit, hashlib, os, signal, sys, time
from sora_jax import cli
from sora_jax.parsers import interrupt
atexit.register(os.kill, os.getpid(), signal.SIGSEGV)
interrupt.GRACE = 0.2
def asleep(_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
def compiling(_):  # nothing interrupts it, and Python runs no handler meanwhile
    os.kill(os.getppid(), signal.SIGUSR1)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
def orderly(_):
    signal.signal(signal.SIGINT, lambda *_: None)
    compiling(_)
cli.sample = cli.train = {what}
sys.argv[1:] = {arguments}
sys.exit(cli.console())
"""
SAMPLE = ["sample", "--out=a.gif"]
TRAIN = ["train", "--config=a.py", "--workdir=a"]


def listening() -> None:
    """Let a new process have Ctrl-C even if this one runs in the background, where shells switch it off."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("what, arguments, signals, words", [
    ("asleep", SAMPLE, 0, "interrupted; the files that it has written are complete"),
    ("asleep", TRAIN, 0, "interrupted; the same command goes on where the last save was"),
    ("compiling", SAMPLE, 1, "interrupted; the files that it has written are complete"),
    ("orderly", TRAIN, 2, "interrupted; the same command goes on where the last save was"),
])  # fmt: skip
def test_ctrl_c_ends_a_command_with_130_also_while_a_program_compiles(what, arguments, signals, words):
    ready = signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        program = INTERRUPTED.format(what=what, arguments=arguments)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipe = dict(env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=listening)
        process = subprocess.Popen([sys.executable, "-c", program], **pipe)
        if signals:
            assert signal.sigtimedwait([signal.SIGUSR1], 30)
        for _ in range(signals):
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            if signals > 1:
                with pytest.raises(subprocess.TimeoutExpired):  # the first one asks for an orderly stop
                    process.wait(0.5)
                signals = 1
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        signal.signal(signal.SIGUSR1, ready)
    assert process.returncode == 130 and said.strip() == f"sora-jax: {words}"


def test_a_sample_that_is_interrupted_while_it_compiles(chain, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "False")
    out = tmp_path / "a.gif"
    process = start(
        "sample", f"--workdir={chain.transformer}", "--prompt=a", "--steps=2", f"--out={out}", preexec_fn=listening
    )
    for line in process.stderr:
        if "sampling 1 clip" in line:
            break
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    # The interrupt may be raised, and lost, in a callback of JAX; then the process is ended a little later.
    assert process.returncode == 130
    assert said.splitlines()[-1] == "sora-jax: interrupted; the files that it has written are complete"
    assert not out.exists() and [path for path in Path(tmp_path).iterdir()] == []
