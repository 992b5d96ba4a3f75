"""CRATE as a classifier: the paper's counts, the official network in NumPy, and runs on labelled images of any size."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_near
from fixtures_runs import ROOT, run
from PIL import Image
from test_crate_blocks import HEADS, WIDTH, arrays, layer_norm, reference_block

from sora_jax.data.packing.packs import PackingConfig, PackItem, pack_batch, token_counts
from sora_jax.errors import UserError
from sora_jax.kinds import KINDS, run_config
from sora_jax.models.crate import SIZES
from sora_jax.models.crate_classifier import CrateClassifierConfig, classifier_specs, classify, forward_flops
from sora_jax.nn.pack import Pack
from sora_jax.nn.params import abstract, count, shardings
from sora_jax.parallel.mesh import MeshConfig, make_mesh, place_batch
from sora_jax.train.autoencoder import to_float
from sora_jax.train.classifier import ClassifierRun, classifier_loss, fits
from sora_jax.train.metrics import read_metrics
from sora_jax.train.state import MODEL

CONFIG = CrateClassifierConfig(
    depth=2, width=WIDTH, heads=HEADS, patch=4, image=(12, 16), classes=3, remat="none", dtype="float32"
)
RUN = ClassifierRun(model=CONFIG, packing=PackingConfig(length=20, slots=3))


@pytest.fixture(scope="module")
def params(randomised):
    values = randomised(classifier_specs(CONFIG))
    return values | {"positions": values["positions"] - 1, "class_token": values["class_token"] - 1}


@pytest.fixture(scope="module")
def images() -> list[PackItem]:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (1, *size, 3), np.uint8) for size in ((12, 16), (8, 4), (4, 12), (8, 8))]
    return [PackItem(x, 1 + i, np.array([1]), label=i % 3) for i, x in enumerate(pixels)]


def pack_of(*rows: list[PackItem], packing=RUN.packs) -> Pack:
    return Pack(**pack_batch(rows, packing))


@pytest.mark.parametrize("size, wanted", list(zip(SIZES, (6_090_856, 13_116_328, 22_796_008, 77_641_192), strict=True)))
def test_counts_are_those_of_the_paper(size, wanted):
    depth, width, heads = SIZES[size]
    assert count(classifier_specs(CrateClassifierConfig(depth=depth, width=width, heads=heads))) == wanted


def reference(p, image):
    """Logits of one image (H, W, 3): patches, norm, linear, norm; class token first; positions; blocks; norm, head."""
    p, (rows, columns) = arrays(p), (image.shape[0] // 4, image.shape[1] // 4)
    patches = image.reshape(rows, 4, columns, 4, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
    x = layer_norm(p["patch_norm"], patches / 127.5 - 1.0) @ p["patch"]["weight"] + p["patch"]["bias"]
    x = np.concatenate([p["class_token"][None], layer_norm(p["token_norm"], x)])
    own = p["positions"][1:].reshape(*CONFIG.grid, -1)[:rows, :columns].reshape(rows * columns, -1)
    x = x + np.concatenate([p["positions"][:1], own])
    for layer in range(CONFIG.depth):
        x = reference_block(jax.tree.map(lambda w, layer=layer: w[layer], p["blocks"]), x)
    return layer_norm(p["head_norm"], x)[0] @ p["head"]["weight"] + p["head"]["bias"]


def test_the_network_is_that_of_the_official_code_for_every_image_of_a_pack(params, images):
    """Images of several sizes in two packs, each against NumPy alone."""
    pack = pack_of(images[:2], images[2:])
    found = jax.jit(lambda p, pack: classify(p, CONFIG, pack, to_float(pack.tokens_BLP)))(params, pack)
    for image, place in zip(images, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        assert_near(found[place], reference(params, image.values[0]))


def test_the_loss_counts_labelled_images_alone(params, images):
    """Cross-entropy with label smoothing, by hand; the gradient of other images in the pack is exactly 0."""
    unknown = [*images[:2], dataclasses.replace(images[3], label=-1)]
    smoothing = RUN.label_smoothing
    (found, (weight, means)) = classifier_loss(RUN, {MODEL: params}, (), pack_of(unknown), 0, 0)
    total, right = 0.0, 0
    for image in images[:2]:
        logits = reference(params, image.values[0])
        logs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        total -= (1 - smoothing) * logs[image.label] + smoothing * logs.mean()
        right += logits.argmax() == image.label
    assert found[MODEL] == pytest.approx(total, rel=1e-4)
    assert weight[MODEL] == 2 and means["accuracy"] == (right, 2)
    pack = pack_of(unknown)

    @jax.grad
    def slope(x_BLP):
        return jnp.sin(classify(params, CONFIG, pack, x_BLP)[0, 1]).sum()

    reached = np.asarray(slope(to_float(pack.tokens_BLP)))[0].any(-1)
    np.testing.assert_array_equal(reached, pack.segments_BL[0] == 2)


def test_a_mesh_agrees_with_one_device(params, images):
    rows = [images[:2], images[2:], images[1:3], images[:1]]
    packs = pack_batch(rows, RUN.packs)

    def forward(params, pack):
        return classify(params, CONFIG, pack, to_float(pack.tokens_BLP))

    wanted = jax.jit(forward)(params, Pack(**packs))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(classifier_specs(CONFIG), mesh))
        found = jax.jit(forward)(placed, Pack(**place_batch(packs, mesh)))
    assert_near(found, wanted)


def test_flops_by_xla(images):
    """XLA also counts norms, softmax and activations, and looks positions up by products."""
    config = CrateClassifierConfig(
        depth=1, width=128, heads=2, patch=8, image=(64, 64), classes=10, remat="none", dtype="float32"
    )
    packing = PackingConfig(64, 1, 1, (1, 8, 8))
    batch = pack_batch([[PackItem(np.zeros((1, 64, 64, 3), np.uint8), 1, np.array([1]))]], packing)
    assert token_counts(batch).sum() == 64
    run = jax.jit(lambda p, pack: classify(p, config, pack, to_float(pack.tokens_BLP)))
    counted = run.lower(abstract(classifier_specs(config)), Pack(**batch)).compile().cost_analysis()["flops"]
    assert 0.95 < counted / forward_flops(config, batch) < 1.1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 5}, "model.width is 12; it must be a multiple of model.heads = 5"),
        ({"image": (12, 15)}, "model.image is (12, 15); both sides must be positive multiples of model.patch = 4"),
        ({"classes": 1}, "model.classes is 1; it must be at least 2"),
        ({"ista_step": 0.0}, "model.ista_step is 0.0; it must be positive and finite"),
    ],
)
def test_mistakes_are_one_sentence(change, message):
    with pytest.raises(UserError) as error:
        dataclasses.replace(CONFIG, **change)
    assert str(error.value) == message


def test_held_out_images_fit_positions_packs_and_classes():
    config = ClassifierRun(model=dataclasses.replace(CONFIG, image=(64, 64)), packing=PackingConfig(length=16, slots=2))
    grids = np.array([[1, 16, 16], [1, 64, 64], [1, 128, 4], [2, 8, 8], [1, 6, 8], [1, 8, 8], [1, 8, 8]])
    images = SimpleNamespace(grids=grids, labels=np.array([0, 0, 0, 0, 0, 3, -1]))
    assert fits(config, images).tolist() == [True, False, False, False, False, False, True]


# --- a run ---

COLOURS = {"red": (220, 40, 40), "blue": (40, 40, 220)}
MODEL_OPTIONS = ["depth=1", "width=12", "heads=2", "patch=4", "image=(16,16)", "classes=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset of red and blue images of three sizes, their classes in a table; two are held out."""
    folder = tmp_path_factory.mktemp("images")
    rows, rng = ["file,label,split"], np.random.default_rng(0)
    for i in range(14):
        name, size = ("red", "blue")[i % 2], ((16, 16), (8, 16), (12, 8))[i % 3]
        pixels = np.clip(rng.normal(COLOURS[name], 20, (*size, 3)), 0, 255).astype(np.uint8)
        (folder / "pictures").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
        rows.append(f"{i}.png,{name},{'test' if i >= 12 else 'train'}")
    (folder / "pictures" / "captions.csv").write_text("\n".join(rows))
    build = ["data", "build", f"--path={folder / 'pictures'}", f"--out={folder / 'data'}", "--multiple=4"]
    assert run(*build, "--max-frames=1", "--max-pixels=256") == 0
    return folder / "data"


def options(data, *changes: str) -> list[str]:
    model = [f"--config.model.{change}" for change in MODEL_OPTIONS]
    settings = ["packing.length=32", "packing.slots=3", "batch=2", "optim.learning_rate=0.01", "optim.warmup_steps=0"]
    settings += ["loop.steps=4", "loop.log_every=1", "loop.preview_every=0", "loop.save_every=2", *changes]
    config = f"--config={ROOT / 'configs' / 'crate.py'}:classifier"
    return ["train", config, f"--config.data={data}", *model, *(f"--config.{change}" for change in settings)]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    assert run(*options(data), f"--workdir={folder}") == 0
    return folder


def test_it_is_trained_on_labelled_images_and_measured_on_held_out_ones(trained):
    kept = json.loads((trained / "config.json").read_text())
    assert kept["kind"] == "classifier" and run_config(kept).model.classes == 2
    rows = read_metrics(trained)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) and 0 <= row["accuracy"] <= 1 for row in rows)
    assert rows[-1]["held_out/accuracy"] in (0.0, 0.5, 1.0)
    assert (trained / "README.md").read_text().startswith("# run\n\nAn image classifier")


def test_it_goes_on_to_the_bit(data, trained, tmp_path):
    """As if the run had been killed before its last checkpoint."""
    stopped = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(stopped / "checkpoints" / "4")
    (stopped / "metrics.jsonl").unlink()
    assert run(*options(data), f"--workdir={stopped}") == 0
    found, wanted = (read_metrics(folder) for folder in (stopped, trained))
    assert [row["step"] for row in found] == [3, 4]
    for name in ("loss", "parameter_norm", "accuracy"):
        assert [row[name] for row in found] == [row[name] for row in wanted[2:]]


@pytest.mark.parametrize(
    "change, message",
    [
        ("model.classes=3", None),
        ("model.image=(8,16)", "config.model.image is (8, 16); it must be at least (16, 16)"),
        ("mesh.sequence=2", "mesh.sequence is 2; it must be 1: a classifier's class tokens cannot be split"),
        ("data=nowhere", "'nowhere' is not a dataset folder"),
        ("label_smoothing=1.0", "label_smoothing is 1.0; it must be from 0 to less than 1"),
    ],
)
def test_what_does_not_fit_is_refused(data, tmp_path, capsys, change, message):
    code = run(*options(data, change), f"--workdir={tmp_path / 'run'}", "--dry-run")
    assert code == (2 if message else 0)
    assert message is None or message in capsys.readouterr().err


def test_it_is_in_the_table_of_kinds():
    assert KINDS["classifier"].config is ClassifierRun
