"""Begin with the weights of another run: all of them, frozen in part, or under low-rank adapters."""

import dataclasses
import functools
import json
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_near
from fixtures_runs import Chain, chain, one_device, run, train_options  # noqa: F401
from flax.traverse_util import flatten_dict, unflatten_dict

from sora_jax.convert.command import _save_run
from sora_jax.convert.tensors import read_tensors
from sora_jax.data.packing.packs import PackingConfig as Packing
from sora_jax.data.packing.packs import PackItem, pack, stack
from sora_jax.errors import UserError
from sora_jax.generate.run import load_run
from sora_jax.models.denoiser import denoise, denoiser_specs
from sora_jax.models.transformer import TransformerConfig
from sora_jax.nn import params as param
from sora_jax.nn.lora import ADAPTER, DOWN, UP, merge_adapters
from sora_jax.nn.pack import Pack
from sora_jax.parallel.mesh import MeshConfig, make_mesh, place_batch
from sora_jax.plan.denoiser import train_denoiser
from sora_jax.train.adapt import InitConfig, LoraConfig, fitting, matches, merge, split_specs
from sora_jax.train.checkpoint import Checkpoints
from sora_jax.train.denoiser import DenoiserRun, DiffusionConfig, PreviewConfig, denoiser_groups, denoiser_loss
from sora_jax.train.loop import with_fixed
from sora_jax.train.metrics import read_metrics
from sora_jax.train.state import MODEL

INIT = InitConfig("some/run")
CLASSES = TransformerConfig(depth=2, width=16, heads=2, latent_channels=2, text=None, classes=3, remat="none")
RUN = DenoiserRun(
    model=CLASSES,
    packing=Packing(length=24, slots=3),
    init=INIT,
    lora=LoraConfig(rank=2, alpha=4.0, paths=("blocks", "head", "patch")),
)
SPECS = denoiser_specs(CLASSES)


def batch(rows=8) -> dict:
    rng = np.random.default_rng(0)
    items = [[PackItem(rng.standard_normal((2, 4, 6, 2)), 7 + i, np.array([1]), label=i % 3)] for i in range(rows)]
    return stack([pack(row, RUN.packs) for row in items])


def filled(specs, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), param.abstract(specs))


def test_a_pattern_names_a_path_what_lies_below_it_and_what_it_matches():
    assert matches("blocks/qkv/weight", ["blocks"]) and matches("blocks/qkv/weight", ["blocks/qkv/weight"])
    assert matches("blocks/cross_q/weight", ["blocks/cross_*"]) and matches("text/blocks/mlp/up/bias", ["*/mlp"])
    assert not matches("blocks/qkv/weight", ["block", "qkv", "blocks/q"])


@pytest.mark.parametrize(
    "options",
    [
        {"freeze": ("blocks",)},
        {"freeze": ("blocks/*/bias", "classes")},
        {"lora": RUN.lora},
        {"lora": RUN.lora, "init": InitConfig("some/run", ("classes",))},
    ],
)
def test_what_is_trained_and_what_is_fixed_make_the_network(options):
    trained, fixed = (flatten_dict(tree, sep="/") for tree in split_specs(SPECS, **({"init": INIT} | options)))
    assert not trained.keys() & fixed.keys()
    own = {p: s for p, s in (trained | fixed).items() if not p.endswith(ADAPTER)}
    whole = flatten_dict(SPECS, sep="/")
    assert {p: s.shape for p, s in own.items()} == {p: s.shape for p, s in whole.items()}
    if "freeze" in options:
        assert all(matches(path, options["freeze"]) for path in fixed)
    elif "init" in options:
        assert {p for p in trained if not p.endswith(ADAPTER)} == {"classes"}
    else:
        assert all(path.endswith(ADAPTER) for path in trained)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"freeze": ("blocks",)}, "freeze is .*; it needs the weights of a run: give --init-from=RUN"),
        ({"freeze": ("block",), "init": INIT}, "freeze is .*; there is no 'block'; allowed: .*blocks/qkv"),
        ({"lora": LoraConfig(2, paths=("up",)), "init": INIT}, "lora.paths is .*; there is no 'up'; allowed"),
        ({"freeze": ("*",), "init": INIT}, "that is all of the network"),
        ({"freeze": ("blocks",), "lora": RUN.lora, "init": INIT}, "with lora.rank = 2 all is frozen"),
        ({"init": InitConfig("some/run", ("head/wait",))}, "init.renew is .*; there is no 'head/wait'; allowed"),
    ],
)
def test_what_cannot_be_is_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        split_specs(SPECS, **options)


def test_every_network_takes_the_default_paths():
    """Not all have attention to captions, which the defaults name."""
    trained, _ = split_specs(SPECS, init=INIT, lora=LoraConfig(rank=2))
    layers = {path.rpartition("/")[0] for path in flatten_dict(trained, sep="/")}
    assert layers == {"blocks/qkv", "blocks/merge", "blocks/mlp/up", "blocks/mlp/down"}


def test_an_adapter_begins_as_the_network_and_is_its_product_after():
    base, pack_ = filled(SPECS), Pack(**batch(2))
    trained, fixed = split_specs(SPECS, init=INIT, lora=RUN.lora)
    first = param.init(trained, jax.random.key(0))
    constants = {p: s for p, s in flatten_dict(fixed, sep="/").items() if p.endswith(ADAPTER)}
    kept = merge(base, unflatten_dict(param.init(constants, jax.random.key(0)), sep="/"))
    out = functools.partial(denoise, config=CLASSES, pack=pack_, x_BLP=pack_.tokens_BLP, times_BR=jnp.full((2, 3), 0.5))
    chex.assert_trees_all_equal(out(merge(kept, first)), out(base))
    adapted = merge(kept, filled(trained, 1))
    merged = merge_adapters(adapted)
    assert merged.keys() == base.keys()
    assert np.abs(out(adapted) - out(base)).max() > 0.1
    chex.assert_trees_all_close(out(adapted), out(merged), rtol=1e-4, atol=1e-4)
    # W + alpha / rank A B of one layer, by hand
    a, b = (adapted["blocks"]["qkv"][name] for name in (DOWN, UP))
    wanted = base["blocks"]["qkv"]["weight"] + 4.0 / 2 * np.einsum("ldr,lrcnk->ldcnk", a, b)
    np.testing.assert_allclose(merged["blocks"]["qkv"]["weight"], wanted, rtol=1e-5, atol=1e-6)


def loss_and_gradient(mesh_config, devices):
    """The loss of adapters on a mesh and its gradient: that of the fixed parameters is not computed."""
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    trained, fixed = split_specs(SPECS, init=INIT, lora=RUN.lora)
    with jax.set_mesh(mesh):
        place = lambda specs, seed: jax.device_put(filled(specs, seed), param.shardings(specs, mesh))  # noqa: E731
        loss = with_fixed(functools.partial(denoiser_loss, RUN))
        frozen = {MODEL: place(fixed, 0)}, ()
        data = Pack(**place_batch(batch(), mesh))
        value = lambda params: loss({MODEL: params}, frozen, data, jnp.int32(3), 0)[0][MODEL]  # noqa: E731
        return jax.device_get(jax.jit(jax.value_and_grad(value))(place(trained, 1)))


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=2, sequence=4)])
def test_adapters_on_any_mesh_are_those_of_one_device(mesh):
    assert_same = functools.partial(assert_near, tolerance=1e-5, least=0.0, share=1e-2)
    (loss, gradient), (wanted, slopes) = loss_and_gradient(mesh, 8), loss_and_gradient(MeshConfig(), 1)
    assert_same(loss, wanted)
    assert_same(gradient, slopes)


def test_a_plan_counts_the_state_of_adapters_alone():
    held = train_denoiser(RUN, make_mesh(devices=jax.devices()[:1])).held
    trained, fixed = split_specs(SPECS, init=INIT, lora=RUN.lora)
    assert sum(x.size for x in jax.tree.leaves(held["parameters"])) == param.count(trained)
    assert sum(x.size for x in jax.tree.leaves(held["frozen"])) == param.count(fixed)


def test_parameters_of_another_shape_are_listed_and_begin_anew_only_when_named():
    found = filled(denoiser_specs(dataclasses.replace(CLASSES, classes=5)))
    wanted = flatten_dict(SPECS, sep="/")
    message = "classes ((6, 16) there, (4, 16) here); to begin these at random: --renew=classes"
    with pytest.raises(UserError, match=re.escape(message)):
        fitting(found, wanted, INIT)
    taken = fitting(found, wanted, InitConfig("some/run", ("classes",)))
    assert taken.keys() == wanted.keys() - {"classes"}


def test_another_network_is_told_in_a_line():
    found = filled(denoiser_specs(dataclasses.replace(CLASSES, width=24)))
    with pytest.raises(
        UserError, match="and [0-9]+ more: this is another network; take the config of that run"
    ) as said:
        fitting(found, flatten_dict(SPECS, sep="/"), INIT)
    assert len(str(said.value)) < 600


def test_a_checkpoint_is_named_behind_an_at_sign(tmp_path):
    (tmp_path / "me@home").mkdir()
    assert [str(x) for x in InitConfig(f"{tmp_path}/me@home").source] == [f"{tmp_path}/me@home", "newest"]
    assert [str(x) for x in InitConfig("runs/a@best").source] == ["runs/a", "best"]
    assert [str(x) for x in InitConfig("runs/a@1/b").source] == ["runs/a@1/b", "newest"]


TUNE = ["loop.steps=4", "loop.save_every=4", "loop.preview_every=0", "preview.prompts=()", "optim.learning_rate=0.1"]
TUNE += ["optim.ema=(0.0,)", "optim.warmup_steps=0"]


def tuned(chain, out, *options) -> int:  # noqa: F811
    changes = [f"--config.{change}" for change in TUNE]
    return run("train", f"--init-from={chain.transformer}", f"--workdir={out}", *changes, *options)


@pytest.fixture(scope="module")
def adapted(chain: Chain):  # noqa: F811
    """A run that trained adapters on the chain's transformer, and its merged copy."""
    options = ["--config.lora.rank=2"]
    folder = chain.made("adapted", lambda out: tune_options(chain, out, *options))
    return folder, chain.made("merged", lambda out: ["convert", "--to=run", f"--workdir={folder}", f"--out={out}"])


def tune_options(chain, out, *options):  # noqa: F811
    changes = [f"--config.{change}" for change in TUNE]
    return ["train", f"--init-from={chain.transformer}", f"--workdir={out}", *changes, *options]


def test_a_run_of_adapters_holds_the_first_weights_and_samples_as_its_merged_copy(chain, adapted):  # noqa: F811
    folder, merged = adapted
    with one_device():
        first, tuned_, whole = (load_run(f) for f in (chain.transformer, folder, merged))
        fixed = {p: x for p, x in flatten_dict(tuned_.params, sep="/").items() if not p.endswith(ADAPTER)}
        chex.assert_trees_all_equal(fixed, flatten_dict(first.params, sep="/"))
        assert whole.config.lora.rank == 0 and not whole.config.init.weights
        assert flatten_dict(whole.params).keys() == flatten_dict(first.params).keys()
        ask = dict(prompts=["a red square"], sizes=(9, 16, 24), steps=2)
        a, b, c = (one.generate(**ask)[0].astype(int) for one in (first, tuned_, whole))
        assert np.abs(a - b).max() > 2 and np.abs(b - c).max() <= 1
        saved = Checkpoints(folder / "checkpoints")
        held = json.loads((folder / "checkpoints" / "4" / "arrays" / "metadata").read_text())
        assert saved.latest() == 4 and all(name.endswith(ADAPTER[:2]) for name in held["ema"])


def test_a_run_of_adapters_goes_on_and_is_tuned_again(chain, adapted, tmp_path, capsys):  # noqa: F811
    folder, _ = adapted
    assert run("train", f"--init-from={folder}", f"--workdir={tmp_path / 'again'}", "--config.loop.steps=2") == 0
    said = capsys.readouterr().out
    assert f"begins with the averaged weights of '{folder}' at step 4" in said
    with one_device():
        assert load_run(tmp_path / "again").config.lora.rank == 0  # all of the network, with the adapters merged


def test_a_run_that_was_killed_in_its_first_save_begins_with_the_weights_again(adapted, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(adapted[0], workdir)
    saves = workdir / "checkpoints"
    (saves / "4").rename(saves / "4.orbax-checkpoint-tmp")
    shutil.rmtree(workdir / "base")
    shutil.copytree(workdir / "checkpoints", workdir / "base")  # what another start has left, as it were
    assert run("train", f"--workdir={workdir}", "--config.loop.steps=2") == 0
    assert "begins with the averaged weights of" in capsys.readouterr().out
    with one_device():
        load_run(workdir)
    assert [row["step"] for row in read_metrics(workdir)] == [1, 2]


def test_frozen_parameters_stay_and_the_others_learn(chain, tmp_path):  # noqa: F811
    assert run(*tune_options(chain, tmp_path / "run", "--freeze=text,blocks/mlp")) == 0
    assert run("train", f"--workdir={tmp_path / 'run'}", "--config.loop.steps=5") == 0  # by its folder alone
    with one_device():
        before, after = (flatten_dict(load_run(f).params, sep="/") for f in (chain.transformer, tmp_path / "run"))
    same = {path for path in before if np.array_equal(before[path], after[path])}
    assert same == {path for path in before if matches(path, ("text", "blocks/mlp"))}
    for name in ("tokenizer.json", "frozen"):  # words and latents keep their meaning
        assert (tmp_path / "run" / name).exists()
    tokenizers = ((f / "tokenizer.json").read_text() for f in (chain.transformer, tmp_path / "run"))
    assert len(set(tokenizers)) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--init-from=nowhere"], "--init-from is 'nowhere'; there is no config.json"),
        (["--init-from={transformer}@7"], "--init-from is .*'7'; the whole checkpoints"),
        (["--init-from={autoencoder}", "--config={tiny}"], "that run is of kind 'autoencoder', and it must be"),
        (
            ["--init-from={transformer}", "--config.model.width=48"],
            "parameters differ: .* more: this is another network",
        ),
        (["--init-from={transformer}", "--renew=clases"], "config.init.renew is .*; there is no 'clases'; allowed"),
        (["--freeze=text", "--config={tiny}"], "it needs the weights of a run: give --init-from=RUN"),
        ([], "--config is not given; without --init-from=RUN, or a run in --workdir, it must be"),
    ],
)
def test_first_weights_that_do_not_fit_are_one_sentence(chain, tmp_path, capsys, options, message):  # noqa: F811
    from fixtures_runs import TINY

    filled_in = [o.format(transformer=chain.transformer, autoencoder=chain.autoencoder, tiny=TINY) for o in options]
    data = [f"--config.latents={chain.latents}"] if any("config=" in o for o in options) else []
    assert run("train", f"--workdir={tmp_path / 'run'}", *filled_in, *data) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """A DiT with random weights, and a run of random adapters on it."""
    folder = tmp_path_factory.mktemp("dit")
    model = TransformerConfig(
        depth=2, width=16, heads=2, latent_channels=4, text=None, classes=3, rotary=False, sincos_positions=True,
        sincos_axes="xy", qk_norm=False, learned_variance=True, step_times=True, joint_qkv_init=True,
    )  # fmt: skip
    diffusion = DiffusionConfig("vp_linear", "eps")
    preview = PreviewConfig(classes=(0,), sizes=((1, 32, 32),))
    config = DenoiserRun(model=model, packing=Packing(length=4, slots=1), diffusion=diffusion, preview=preview)
    lora = dataclasses.replace(config, init=INIT, lora=LoraConfig(rank=2, alpha=4.0, paths=("blocks",)))
    with one_device():
        base = filled(denoiser_specs(model))
        _save_run(folder / "base", config, base, denoiser_groups(config))
        trained, fixed = split_specs(denoiser_specs(model), init=INIT, lora=lora.lora)
        _save_run(folder / "lora", lora, filled(trained, 1), denoiser_groups(lora))
        from sora_jax.train.checkpoint import save_tree

        scales = {p: s for p, s in flatten_dict(fixed, sep="/").items() if p.endswith(ADAPTER)}
        save_tree(folder / "lora" / "base", merge(base, unflatten_dict(param.init(scales, jax.random.key(0)), sep="/")))
    return folder


def test_exported_adapters_make_the_merged_weights_of_the_exported_base(dit):
    """In the other's layout: W + B A of each tensor, as PEFT computes it, is that of the merged run."""
    for name, kind in (("base", "diffusers-dit"), ("lora", "diffusers-dit")):
        assert run("convert", f"--to={kind}", f"--workdir={dit / name}", f"--out={dit / f'{name}_out'}") == 0
    assert run("convert", "--to=diffusers-lora", f"--workdir={dit / 'lora'}", f"--out={dit / 'a.safetensors'}") == 0
    base, merged, lora = (read_tensors(dit / x) for x in ("base_out", "lora_out", "a.safetensors"))
    stems = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in lora}
    assert "transformer_blocks.1.attn1.to_q" in stems and len(lora) == 2 * len(stems) == 2 * 2 * 7
    for name, wanted in merged.items():
        stem = name.removesuffix(".weight")
        product = 0.0
        if name.endswith(".weight") and stem in stems:
            a, b = (lora[f"transformer.{stem}.lora_{part}.weight"] for part in "AB")
            assert a.shape[0] == b.shape[1] == 2
            product = b @ a
        np.testing.assert_allclose(base[name] + product, wanted, rtol=1e-5, atol=1e-5)
