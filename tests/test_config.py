"""One way between files, flags and frozen dataclasses; every mistake names the field."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from sora_jax.benchmarks.phyworld import PhyworldBench
from sora_jax.config import first_difference, from_dict, load, to_config_dict, to_dict
from sora_jax.data.building.prepare import BuildConfig
from sora_jax.errors import UserError
from sora_jax.kinds import run_config
from sora_jax.models.text import TextConfig
from sora_jax.parsers.configs import read_file
from sora_jax.quickstart import QuickstartConfig
from sora_jax.train.denoiser import PreviewConfig

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = str(CONFIGS / "tiny.py")


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    name: str = "a"
    sizes: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    steps: int = 3
    crop: tuple[int, int, int] = (1, 2, 3)
    limit: int | None = None
    keep: bool = True


EXAMPLE = Outer(Inner(0.25, "b", ((1, 2), (3, 4))), 7, (4, 5, 6), 9, False)


@pytest.mark.parametrize("config", [Outer(), EXAMPLE, dataclasses.replace(EXAMPLE, limit=None)])
def test_round_trips(config):
    assert from_dict(Outer, to_config_dict(config)) == config
    assert from_dict(Outer, to_dict(config)) == config
    hash(from_dict(Outer, to_dict(config)))  # lists of JSON are tuples again, at every depth


def test_a_whole_number_is_a_float_and_nothing_else_is_converted():
    rate = from_dict(Inner, {"rate": 1}).rate
    assert rate == 1.0 and type(rate) is float


@pytest.mark.parametrize(
    "values, where",
    [
        ({"stepz": 3}, "config.stepz"),
        ({"inner": {"rat": 3}}, "config.inner.rat"),
        ({"steps": 3.0}, "config.steps"),
        ({"steps": True}, "config.steps"),
        ({"steps": "3"}, "config.steps"),
        ({"steps": None}, "config.steps"),
        ({"keep": 1}, "config.keep"),
        ({"limit": "many"}, "config.limit"),
        ({"inner": {"rate": "fast"}}, "config.inner.rate"),
        ({"inner": 3}, "config.inner"),
        ({"inner": None}, "config.inner"),
        ({"crop": 3}, "config.crop"),
        ({"crop": (1, 2)}, "config.crop"),
        ({"crop": (1, 2, "3")}, "config.crop[2]"),
        ({"inner": {"sizes": ((1, 2), (3, None))}}, "config.inner.sizes[1][1]"),
        ({"inner": {"sizes": ((1, 2, 3),)}}, "config.inner.sizes[0]"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_the_field(values, where):
    with pytest.raises(UserError, match=rf"^{re.escape(where)} is [^\n]*$"):
        from_dict(Outer, values)


def test_unknown_field_says_what_is_allowed():
    with pytest.raises(UserError, match="allowed: inner, steps, crop, limit, keep"):
        from_dict(Outer, {"stepz": 3})


def test_mutable_is_locked():
    config = to_config_dict(Outer())
    with pytest.raises(AttributeError):
        config.stepz = 3
    with pytest.raises(TypeError):
        config.inner.name = 3.5


def variants(path: Path) -> list[str]:
    """The config file with each of its VARIANTS."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [f"{path}:{name}" if name else path.as_posix() for name in module.VARIANTS]


FILES = [name for path in sorted(CONFIGS.glob("*.py")) for name in variants(path)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: Path(file).name)
def test_every_config_and_variant_is_valid(file):
    values = load(file)
    kinds = {"sources": BuildConfig, "evaluate": QuickstartConfig, "curve": PhyworldBench}
    found = [cls for name, cls in kinds.items() if name in values]
    config = from_dict(found[0], values) if found else run_config(values)
    assert from_dict(type(config), to_dict(config)) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.name)
def test_an_unknown_variant_is_refused_with_those_allowed(path):
    with pytest.raises(UserError, match=r"'nonsense'.*allowed") as caught:
        load(f"{path}:nonsense")
    allowed = set(re.findall(r"'([\w/]*)'", str(caught.value).partition("allowed")[2])) - {""}
    # Where a variant has several words, the first one is refused first.
    assert allowed == {re.split("[/]|_(?=[0-9]x)", name)[0] for name in read_file(path)["variants"]} - {""}


def test_overrides_reach_every_type():
    changes = ["crop=(9,24,24)", "seed=4", "optim.learning_rate=1e-2", "optim.schedule=cosine", "data=a b"]
    config = run_config(load(f"{TINY}:autoencoder", [*changes, "model.remat=True", "optim.ema=(0.5,)"]))
    found = (config.crop, config.seed, config.optim.learning_rate, config.optim.schedule, config.data)
    assert found == ((9, 24, 24), 4, 0.01, "cosine", "a b")
    assert config.model.remat is True and config.optim.ema == (0.5,)


@pytest.mark.parametrize(
    "change, words",
    [
        ("optimm.ema=(0.5,)", ["config.optimm.ema", "'optimm'", "optim"]),
        ("optim.rate=3", ["config.optim.rate", "'rate'", "learning_rate"]),
        ("seed=three", ["config.seed", "three"]),
        ("seed=1.5", ["config.seed", "1.5"]),
        ("seed=None", ["config.seed", "None"]),
        ("crop=(1,2)", ["config.crop", "(1, 2)", "3"]),
        ("crop=7", ["config.crop", "7"]),
        ("crop=(5,16,'a')", ["config.crop[2]", "'a'"]),
        ("optim.schedule=never", ["optim.schedule", "'never'", "'cosine'"]),
        ("optim=3", ["config.optim", "3"]),
        ("seed", ["config.seed"]),
    ],
)
def test_a_wrong_override_is_one_sentence_that_names_it(change, words):
    with pytest.raises(UserError) as caught:
        run_config(load(f"{TINY}:autoencoder", [change]))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"--config is 'configs/none.py:a'; there is no file 'configs/none.py'"):
        load("configs/none.py:a")


DATA = str(CONFIGS / "data.py")


@pytest.mark.parametrize(
    "file, changes, path, value",
    [
        (f"{DATA}:video", ["min_pixels=1024", "sources[0].path=clips"], "min_pixels", 1024),
        (f"{DATA}:mixed", ["sources[2].path=x", "sources[2].limit=7"], "sources[2].limit", 7),
        (f"{DATA}:mixed", ["fps=8.0"], "fps", 8.0),
        (f"{DATA}:mixed", ["fps=8"], "fps", 8.0),
        (f"{DATA}:navit", ["max_tokens=64"], "max_tokens", 64),
        (f"{DATA}:video", ["fps=None"], "fps", None),
        (f"{DATA}:labels", ["sources[0].label_field=7"], "sources[0].label_field", "7"),
        (TINY, ["packing.patch=(1,2,2)"], "packing.patch", (1, 2, 2)),
        (TINY, ["packing.patch=(1,2,2)", "packing.patch=None"], "packing.patch", None),
        (TINY, ["model.text=None"], "model.text", None),
        (TINY, ["model.text=None", "model.text.width=64"], "model.text", TextConfig(width=64)),
        (TINY, ["preview={'fps': 3.0}"], "preview", PreviewConfig(fps=3.0)),
        (TINY, ["optim.ema[1]=0.5"], "optim.ema", (0.9, 0.5)),
        (TINY, ["optim.ema=0.5"], "optim.ema", (0.5,)),
        (TINY, ["preview.prompts=cat", "preview.sizes=((1,16,16),)"], "preview.prompts", ("cat",)),
        (TINY, ["diffusion.times.stratified"], "diffusion.times.stratified", True),
        (TINY, ["seed=0x10"], "seed", 16),
    ],
)  # fmt: skip
def test_what_may_be_none_is_set_from_the_command_line(file, changes, path, value):
    values = load(file, changes)
    config = from_dict(BuildConfig, values) if "sources" in values else run_config(values)
    assert eval(f"config.{path}", {"config": config}) == value


def test_a_config_file_may_set_none_and_groups_of_its_own(tmp_path):
    """As files of users do: no dataclass tells the types."""
    (tmp_path / "own.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict({'a': None, 'b': {'c': None, 'd': 1.5, 'e': (1, 2)}})\n"
    )
    changes = ["a=4", "b.c=some words", "b.d=2", "b.e[0]=7"]
    found = load(str(tmp_path / "own.py"), changes).to_dict()
    assert found == {"a": 4, "b": {"c": "some words", "d": 2.0, "e": (7, 2)}}
    assert load(str(tmp_path / "own.py"), ["b=None"]).b is None


@pytest.mark.parametrize(
    "change, message",
    [
        ("min_pixels=many", "--config.min_pixels is 'many'; it must be None or of type int"),
        ("sources[0].limit=1.5", "--config.sources[0].limit is '1.5'; it must be None or of type int"),
        ("sources[1].path=x", "--config.sources[1].path is not an option: there is no [1] among 1 entries"),
        ("sources[0].pat=x", "--config.sources[0].pat is not an option: there is no 'pat'; .*; did you mean path?"),
        ("sources.path=x", "--config.sources.path is not an option: there is no 'path' among 1 entries, named by"),
        ("min_pixel=3", "--config.min_pixel is not an option: there is no 'min_pixel'; .*; did you mean min_pixels?"),
        ("cuts=maybe", "--config.cuts is 'maybe'; it must be true or false"),
        ("fps", "--config.fps is given without a value; write --config.fps=VALUE"),
        ("a b=3", "--config.a b is not an option; write --config.NAME=VALUE"),
        ("multiple=0", "--config.multiple is 0; it must be at least 1"),
    ],
)
def test_the_option_at_fault_is_named_as_typed_and_no_other(change, message):
    with pytest.raises(UserError) as caught:
        from_dict(BuildConfig, load(f"{DATA}:video", ["sources[0].path=clips", change]), "--config")
    assert re.match(message.replace("[", r"\[").replace("?", r"\?"), str(caught.value)), caught.value


@pytest.mark.parametrize(
    "change, message",
    [
        ("model.text=3", "--config.model.text is '3'; it is a group of options, give one of them: .*, or None"),
        ("model=None", "--config.model is 'None'; it is a group of options"),
        ("batch=None", "--config.batch is 'None'; it must be of type int"),
        ("batch.x=3", "--config.batch.x is not an option: 8 has no 'x'"),
        ("batch=7 loop.accumulate=2", "--config.batch is 7; it must be a positive multiple of loop.accumulate = 2"),
        ("optim.learning_rate=-1", "--config.optim.learning_rate is -1.0; "),
        ("diffusion.times.mean=nan", "--config.diffusion.times.mean is nan; "),
        ("model.text.vocabulary=1", "--config.model.text.vocabulary is 1; "),
        ("sampling.guidance.end=2.0", "--config.sampling.guidance.end is 2.0; "),
        ("packing.length=0", "--config.packing.length is 0; "),
        ("feed.workers=-1", "--config.feed.workers is -1; "),
        ("captions=most", "--config.captions is 'most'; "),
        ("seed=-1", "--config.seed is -1; "),
    ],
)
def test_a_message_of_a_nested_dataclass_names_the_whole_path(change, message):
    with pytest.raises(UserError, match=f"^{message}"):
        run_config(load(TINY, change.split()))


def test_a_crop_is_named_as_it_is_typed():
    for change, message in (
        ("crop=(5,0,16)", "--config.crop is .5, 0, 16.: height is 0; "),
        ("image_share=2.0", "--config.image_share is 2.0; "),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            run_config(load(f"{TINY}:autoencoder", [change]))


def test_first_difference_is_the_path_of_the_first_value_that_differs():
    assert first_difference(to_dict(EXAMPLE), to_dict(EXAMPLE)) is None
    other = dataclasses.replace(EXAMPLE, inner=dataclasses.replace(EXAMPLE.inner, name="c"))
    assert first_difference(to_dict(EXAMPLE), to_dict(other)) == "inner.name"
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1}, "c": None}) is None
    assert first_difference({"a": 1}, {"a": {"b": 1}}) == "a"


@pytest.mark.parametrize("kind, model, name", [
    ("transformer", dict(depth=2), "transformer"),
    ("denoiser", dict(width=96), "transformer"),
    ("autoencoder", dict(latent_channels=4, width=8), "causal"),
    ("autoencoder", dict(widths=(32, 64)), "kl"),
])  # fmt: skip
def test_a_model_without_a_name_is_the_first_of_version_0_1_0_that_has_all_fields(kind, model, name):
    assert run_config(dict(kind=kind, model=model)).model.name == name


def test_what_a_user_gives_is_not_taken_for_a_stored_config():
    assert run_config(dict(kind="denoiser", sampling=dict(steps="7"))).sampling.steps == "7"
    with pytest.raises(UserError, match="--config.preview.steps is 20; it must be of type str"):
        run_config(dict(kind="denoiser", preview=dict(steps=20)))
    for values in (dict(preview=None), dict(preview="x"), dict(model="x"), dict(model=[1]), dict(kind=["a"])):
        with pytest.raises(UserError, match=r"^--config\.(preview|model|kind) is "):
            run_config(dict(kind="denoiser") | values)
