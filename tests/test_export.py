"""An exported model is read like its run: as a folder, as a file, and by the name of a shipped one."""

import json
import shutil

import jax
import numpy as np
import pytest
from fixtures_runs import chain, one_device, run, trained  # noqa: F401
from flax.traverse_util import flatten_dict
from PIL import Image

import sora_jax
from sora_jax.config import read_json
from sora_jax.convert.export import _public
from sora_jax.data.viewing.write import read_comment, write_video
from sora_jax.generate import shipped
from sora_jax.generate.inputs import TaskOptions, read_inputs
from sora_jax.generate.recipe import enlarged_by, save_recipe
from sora_jax.generate.run import load_run
from sora_jax.nn.lora import merge_adapters
from sora_jax.train import exported
from sora_jax.train.exported import run_folder
from sora_jax.train.frozen import load_autoencoder

PROMPT = "a red square moves right"


@pytest.fixture(scope="module")
def models(chain, tmp_path_factory):  # noqa: F811
    """The transformer of the chain: `world`, a folder of bfloat16, and `exact.safetensors`, a file of float32."""
    folder = tmp_path_factory.mktemp("models")
    assert run("export", chain.transformer, f"--out={folder / 'world'}") == 0
    assert run("export", chain.transformer, f"--out={folder / 'exact.safetensors'}", "--dtype=float32") == 0
    return folder


@pytest.fixture
def assets(models, monkeypatch, tmp_path):
    """A package that comes with the exported model `world`; the working folder is an empty one."""
    monkeypatch.setattr(exported, "ASSETS", models)
    monkeypatch.chdir(tmp_path)
    shipped.shipped_run.cache_clear()
    yield models
    shipped.shipped_run.cache_clear()


def weights(model) -> dict:
    return {path: np.asarray(x) for path, x in flatten_dict(model.params, sep="/").items()}


def test_a_model_of_float32_makes_the_clips_of_its_run_to_the_bit(chain, models, trained):  # noqa: F811
    with one_device():
        found, prompts = load_run(models / "exact.safetensors"), [PROMPT, "a green square"]
        assert found.step == trained.step == 6 and found.seen == trained.seen
        for a, b in zip(found.generate(prompts, steps=2), trained.generate(prompts, steps=2), strict=True):
            np.testing.assert_array_equal(a, b)
    assert found.autoencoder.fingerprint == trained.autoencoder.fingerprint


def test_a_model_of_bfloat16_is_that_of_rounded_weights(models, trained):  # noqa: F811
    with one_device():
        found = load_run(models / "world")
        near = found.generate(PROMPT, steps=2).astype(int) - trained.generate(PROMPT, steps=2)
    assert 0 < np.abs(near).mean() < 3
    own, rounded = weights(trained), weights(found)
    for path, x in own.items():
        assert rounded[path].dtype == np.float32
        np.testing.assert_allclose(rounded[path], x, rtol=2**-8, atol=0)  # 8 bits, the first of which is not stored
    assert any((rounded[path] != x).any() for path, x in own.items())


def test_rounded_weights_are_another_autoencoder_with_caches_of_its_own(chain, models, tmp_path):  # noqa: F811
    record = read_json(models / "world" / "frozen" / "autoencoder.json")
    own = load_autoencoder(chain.autoencoder)
    assert load_autoencoder(models / "world").fingerprint == record["fingerprint"] != own.fingerprint
    assert record["steps"] == 6
    out = tmp_path / "latents"
    assert run("data", "encode", f"--autoencoder={models / 'world'}", f"--data={chain.dataset}", f"--out={out}") == 0
    assert load_autoencoder(out).fingerprint == record["fingerprint"]


def test_files_and_card(models):
    names = {path.relative_to(models / "world").as_posix() for path in (models / "world").rglob("*") if path.is_file()}
    assert names >= {"README.md", "config.json", "export.json", "model.safetensors", "seen.json", "tokenizer.json"}
    assert names >= {"frozen/autoencoder.json", "frozen/weights.safetensors"}
    assert read_json(models / "world" / "config.json")["latents"] == ""  # no folder of the machine that trained it
    card = (models / "world" / "README.md").read_text()
    total = sum(x.size for x in exported.read_arrays(models / "world" / "model.safetensors").values())
    assert f"| {total:,} trained |" in card and f'--prompt="{PROMPT}"' in card and "| step 6, kept as" in card
    assert "sora-jax train" not in card  # there is nothing that a training could go on with


def test_an_export_says_nothing_of_the_machine(chain, models, tmp_path):  # noqa: F811
    """Neither a folder nor a command as it was typed, in the texts of a folder and in the metadata of a file."""
    assert run("export", chain.autoencoder, f"--out={tmp_path / 'autoencoder'}") == 0
    texts = dict(exported.packed_texts(models / "exact.safetensors"))
    for folder in (models / "world", tmp_path / "autoencoder"):
        files = [path for path in folder.rglob("*") if path.is_file()]
        texts |= {str(path.relative_to(folder.parent)): path.read_bytes().decode(errors="replace") for path in files}
    assert len(texts) > 12 and str(chain.transformer) in (chain.transformer / "README.md").read_text()
    for name, text in texts.items():
        assert not any(str(folder.parent) in text for folder in (chain.transformer, models, tmp_path)), name
        assert '"command"' not in text and '"devices"' not in text, name


def test_files_and_projects_of_a_config_are_left_out(tmp_path):
    (tmp_path / "t5").mkdir()
    named = {
        "latents": "/home/me/latents",
        "loop": {"wandb": "mine", "steps": 6},
        "loss": {"lpips_file": "/home/me/a.npz"},
    }
    for encoder, left in ((str(tmp_path / "t5"), "t5"), ("/home/me/t5", "t5"), ("google/t5-small", "google/t5-small")):
        found = _public(named | {"model": {"text": {"pretrained": encoder}}})
        assert found["model"]["text"]["pretrained"] == left
        assert found["loop"] == {"wandb": "", "steps": 6} and "/home/me" not in json.dumps(found)
    assert named["loop"]["wandb"] == "mine"
    assert _public({"model": {"text": None}}) == {"model": {"text": None}}


def test_a_model_is_not_exported_onto_itself(models, tmp_path, capsys):
    for name in ("world", "exact.safetensors"):
        (shutil.copytree if name == "world" else shutil.copyfile)(models / name, tmp_path / name)
        assert run("export", tmp_path / name, f"--out={tmp_path / name}") == 2
        assert "that is the model that is exported: give another name" in capsys.readouterr().err
    assert (tmp_path / "exact.safetensors").read_bytes() == (models / "exact.safetensors").read_bytes()
    assert read_json(tmp_path / "world" / "export.json")["step"] == 6


def test_a_run_begins_with_a_model_and_its_adapters_are_merged(chain, models, tmp_path):  # noqa: F811
    file, changes = models / "exact.safetensors", ["lora.rank=2", "loop.steps=2", "preview.prompts=()"]
    changes += [f"latents={chain.latents}", "optim.warmup_steps=0", "optim.learning_rate=0.01"]
    options = [f"--workdir={tmp_path / 'lora'}", *(f"--config.{change}" for change in changes)]
    assert run("train", f"--init-from={file}", *options) == 0
    assert run("export", tmp_path / "lora", f"--out={tmp_path / 'merged'}", "--dtype=float32") == 0
    with one_device():
        adapted, merged, before = (load_run(name) for name in (tmp_path / "lora", tmp_path / "merged", file))
    wanted = flatten_dict(merge_adapters(jax.tree.map(np.asarray, adapted.params)), sep="/")
    found, first = weights(merged), weights(before)
    assert found.keys() == wanted.keys() == first.keys()
    for path in found:
        np.testing.assert_array_equal(found[path], wanted[path])
    moved = {path for path in found if (found[path] != first[path]).any()}
    assert moved and all(path.startswith("blocks/") for path in moved)


def test_an_autoencoder_alone(chain, tmp_path):  # noqa: F811
    assert run("export", chain.autoencoder, f"--out={tmp_path / 'exact'}", "--dtype=float32") == 0
    assert load_autoencoder(tmp_path / "exact").fingerprint == load_autoencoder(chain.autoencoder).fingerprint
    assert "--autoencoder=exact" in (tmp_path / "exact" / "README.md").read_text()


def test_a_file_is_unpacked_once_whole_or_not_at_all(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SORA_JAX_CACHE", str(tmp_path))
    folder = run_folder(models / "exact.safetensors")
    assert folder.is_relative_to(tmp_path)
    (folder / "README.md").write_text("mine")
    assert run_folder(models / "exact.safetensors") == folder and (folder / "README.md").read_text() == "mine"
    shutil.rmtree(folder)
    data = (models / "exact.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(data[: len(data) // 2])
    assert run("sample", f"--workdir={tmp_path / 'half.safetensors'}", "--prompt=a", f"--out={tmp_path / 'a.gif'}") == 2
    assert "half.safetensors'; it cannot be read" in capsys.readouterr().err
    assert not list((tmp_path / "models").iterdir())
    (tmp_path / "no_folder").write_text("")
    monkeypatch.setenv("SORA_JAX_CACHE", str(tmp_path / "no_folder"))  # which cannot be written
    found = run_folder(models / "exact.safetensors")
    assert (found / "export.json").exists() and run_folder(models / "exact.safetensors") == found
    exported._temporary_folder.cache_clear()
    shutil.rmtree(found.parent)


def test_nothing_but_an_exported_model_is_replaced(chain, models, tmp_path, capsys):  # noqa: F811
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("words")
    (tmp_path / "other.safetensors").write_text("words")
    for name in ("mine", "other.safetensors"):
        assert run("export", chain.transformer, f"--out={tmp_path / name}") == 2
        assert "there is something else than an exported model" in capsys.readouterr().err
    assert (mine / "thesis.txt").read_text() == (tmp_path / "other.safetensors").read_text() == "words"
    shutil.copytree(models / "world", tmp_path / "world")
    assert run("export", models / "exact.safetensors", f"--out={tmp_path / 'world'}", "--dtype=float32") == 0
    assert read_json(tmp_path / "world" / "export.json")["dtype"] == "float32"


@pytest.mark.parametrize(
    "options, message",
    [
        (["{}", "--out=x", "--dtype=float16"], "--dtype is 'float16'; allowed: 'bfloat16', 'float32'"),
        (["{}", "--out=x", "--checkpoint=5"], "--checkpoint is '5'"),
        (["{}", "--out=x", "--card=nowhere.md"], "--card is 'nowhere.md'; there is no such file"),
        (["wrold", "--out=x"], "models that come with the package: world; did you mean world?"),
    ],
)
def test_mistakes(chain, assets, capsys, options, message):  # noqa: F811
    assert run("export", *(option.format(chain.transformer) for option in options)) == 2
    assert message in capsys.readouterr().err
    assert not list(assets.glob("x*"))


def test_a_prompt_alone_samples_the_shipped_model_and_the_file_says_how(assets, tmp_path, capsys):
    assert run("sample", f"--prompt={PROMPT}", "--steps=2") == 0
    assert capsys.readouterr().out == "clip.mp4\n"
    assert run("sample", f"--prompt={PROMPT}", "--steps=2", "--out=clip.gif") == 0
    assert run("sample", f"--prompt={PROMPT}", "--steps=2") == 0
    assert "clip_1.mp4" in capsys.readouterr().out  # no file of an earlier call is lost
    recipe = json.loads(read_comment(tmp_path / "clip.gif"))
    assert (
        recipe["upscale"] == 16
        and recipe["size"] == [16, 24]
        and not any("workdir" in word for word in recipe["command"])
    )
    assert run("sample", "--like=clip.gif", "--out=again.gif") == 0
    assert (tmp_path / "again.gif").read_bytes() == (tmp_path / "clip.gif").read_bytes()


def test_a_recipe_without_a_factor_is_of_a_file_that_is_not_enlarged(assets, tmp_path):
    """Version 0.1.0 did not write `--upscale=1`, its default."""
    options = ["--workdir=world", f"--prompt={PROMPT}", "--steps=2"]
    assert run("sample", *options, "--upscale=1", "--out=then.gif") == 0
    recipe = json.loads(read_comment(tmp_path / "then.gif"))
    recipe["command"].remove("--upscale=1")
    write_video("old.gif", np.zeros((9, 16, 24, 3), np.uint8), 8, comment=json.dumps(recipe))
    assert run("sample", "--like=old.gif", "--out=again.gif") == 0
    with open(tmp_path / "again.gif", "rb") as file:
        assert np.frombuffer(file.read(10)[6:], np.uint16).tolist() == [24, 16]  # width, height


def test_a_generated_file_is_read_in_the_size_that_it_was_generated_in(tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (1, 16, 24, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.png", frame, 8, upscale=11)
    task = TaskOptions(image=[str(path)])
    save_recipe(path, {"command": [], "rows": [], "upscale": 11, "size": [16, 24]})
    np.testing.assert_array_equal(read_inputs(task, (9, 16, 24), (8, 8), False).clips[0], frame)


def test_a_recipe_of_a_stranger_changes_no_size(tmp_path, monkeypatch, capsys):
    frame = np.random.default_rng(0).integers(0, 256, (1, 16, 24, 3), dtype=np.uint8)
    path, task = write_video(tmp_path / "a.png", frame, 8), TaskOptions(image=[str(tmp_path / "a.png")])
    for size in ([16, 24], [2, 3], ["a"], None):  # the file's own, cropped, no size, of an older file
        save_recipe(path, {"command": [], "rows": [], "upscale": 4, "size": size})
        np.testing.assert_array_equal(read_inputs(task, (9, 16, 24), (8, 8), False).clips[0], frame)
    path.with_name("a.png.json").unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of more than twice as many Pillow reads nothing
    assert enlarged_by(path, 16, 24) == 1
    assert run("sample", f"--like={path}") == 2 and "it holds no recipe" in capsys.readouterr().err


def test_what_is_calibrated_is_not_written_into_the_package_or_a_file(assets, capsys):
    before = {path: path.stat().st_mtime_ns for path in assets.rglob("*")}
    for name in ("world", assets / "exact.safetensors"):
        assert run("calibrate", f"--workdir={name}") == 2
        assert f"--workdir is '{name}'; what is found is kept in the run" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in assets.rglob("*")} == before


@pytest.mark.parametrize("name", ["world", "exact.safetensors"])
def test_help_lists_the_fields_of_a_model(assets, capsys, name):
    given = name if name == "world" else assets / name
    with pytest.raises(SystemExit) as ended:
        run("sample", f"--workdir={given}", "--help")
    assert ended.value.code == 0 and "--sampling.solver.name=" in capsys.readouterr().out


def test_the_front_of_python(assets, tmp_path):
    with one_device():
        clip = sora_jax.generate(PROMPT, steps=2)
        (same,) = load_run().generate([PROMPT], steps=2)
    np.testing.assert_array_equal(clip, same)
    path = sora_jax.save(np.repeat(clip[:1], 2, 0), tmp_path / "two.gif", fps=4)
    assert path.exists() and sora_jax.save(clip[:1], tmp_path / "one.png", upscale=1).exists()
    (tmp_path / "world").mkdir()  # a folder goes before a shipped model
    assert run_folder("world") == (tmp_path / "world").relative_to(tmp_path)


def test_without_shipped_models_a_run_must_be_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(exported, "ASSETS", tmp_path)
    assert run("sample", "--prompt=a") == 2
    assert "--workdir is not given; it must be the folder of a run" in capsys.readouterr().err
