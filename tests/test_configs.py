"""Every config file gives a valid run for each of its variants, and names them when asked for another."""

import ast
from pathlib import Path

import numpy as np
import pytest

from sora_jax import quickstart
from sora_jax.config import from_dict, load
from sora_jax.data.building.prepare import BuildConfig
from sora_jax.diffusion.solvers import evaluations
from sora_jax.diffusion.spacing import base_times
from sora_jax.errors import UserError
from sora_jax.evaluate.consistency import in_worlds_words
from sora_jax.kinds import run_config
from sora_jax.models.first_stage import autoencoder_specs, latent_grid
from sora_jax.models.transformer import SIZES, denoiser_specs
from sora_jax.nn.params import count
from sora_jax.quickstart import NO_NAME, QuickstartConfig, check_sizes
from sora_jax.worlds import scene
from sora_jax.worlds.captions import CAMERAS, MOTIONS

CONFIGS = Path(__file__).parents[1] / "configs"
VARIANTS = {
    "autoencoder.py": ["base", "kl4", "kl16"],
    "video_autoencoder.py": ["xs_4x8x8", "s_4x8x8", "m_2x4x4"],
    "transformer.py": list(SIZES),
    "unet.py": ["B", "S", "small", "tiny"],
    "video.py": ["autoencoder", "transformer", "small_autoencoder", "small"],
    "sprites.py": ["autoencoder", "transformer"],
    "walt.py": ["XL", "L", "k600", "imagenet", "t2v", "sr", "sr2", "small", "small_sr"],
}
PAIRS = [(file, variant) for file, variants in VARIANTS.items() for variant in variants]


def read(file: str, variant: str):
    return run_config(load(f"{CONFIGS / file}:{variant}"))


@pytest.mark.parametrize("file, variant", PAIRS)
def test_a_config_is_valid_and_shown_in_its_own_docstring(file, variant):
    read(file, variant)
    shown = (CONFIGS / file).read_text()
    assert f"configs/{file}:{variant}" in shown or variant in SIZES


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.name)
def test_a_config_has_one_assignment_a_line(path):
    """The values of a call or a table may be unpacked; several values may not be assigned at once."""
    assignments = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assign)]
    lines = [node.lineno for node in assignments]
    assert len(lines) == len(set(lines))
    for node in assignments:
        assert len(node.targets) == 1, f"{path.name}:{node.lineno}"
        assert not (isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)), node.lineno


@pytest.mark.parametrize("file", VARIANTS)
def test_an_unknown_variant_is_named_with_those_there_are(file):
    with pytest.raises(UserError) as error:
        read(file, "nonsense")
    allowed = [variant.partition("_")[0] for variant in VARIANTS[file]] if "video_" in file else VARIANTS[file]
    assert all(repr(variant) in str(error.value) for variant in ["nonsense", *allowed])


@pytest.mark.parametrize("file", VARIANTS)
def test_without_a_variant_there_is_a_default(file):
    assert run_config(load(str(CONFIGS / file))) in [read(file, variant) for variant in VARIANTS[file]]


FORMS = [("video.py", "autoencoder", "transformer"), ("video.py", "small_autoencoder", "small")]


@pytest.mark.parametrize("file, first, second", [*FORMS, ("sprites.py", "autoencoder", "transformer")])
def test_previews_fit_the_autoencoder_and_a_pack(file, first, second):
    autoencoder, transformer = read(file, first), read(file, second)
    assert autoencoder.model.latent_channels == transformer.model.latent_channels
    for size in transformer.preview.sizes:
        t, h, w = latent_grid(autoencoder.model, *size)
        pt, ph, pw = transformer.model.patch
        assert h % ph == w % pw == t % pt == 0
        assert t * h * w // (pt * ph * pw) <= transformer.packing.length


@pytest.mark.parametrize("file, first, second", FORMS)
@pytest.mark.parametrize("change", ["", "max_pixels=None", "max_frames=17"])
def test_clips_of_any_size_and_length_fit_the_models_that_the_config_of_the_data_is_for(file, first, second, change):
    values = load(f"{CONFIGS / file}:{'small_' if second == 'small' else ''}data", [change] if change else [])
    data, autoencoder, transformer = from_dict(BuildConfig, values), read(file, first), read(file, second)
    assert run_config(load(data.train_config)) == transformer
    for height, width, frames in ((720, 480, 1), (96, 96, 300), (1280, 720, 40), (64, 640, 9), (4320, 7680, 8)):
        length = data.length_of(frames)
        t, h, w = latent_grid(autoencoder.model, length, *data.size_rule(height, width, length))
        pt, ph, pw = transformer.model.patch
        assert h % ph == w % pw == t % pt == 0
        assert t * h * w // (pt * ph * pw) <= transformer.packing.length
    crop = autoencoder.crop
    assert crop[0] <= data.max_frames and crop[1] * crop[2] <= (data.max_pixels or np.inf)


def test_a_config_may_load_another(tmp_path):
    """Their functions and constants of one name stay apart."""
    text = "from sora_jax.config import load\nNAME = {!r}\ndef get_config():\n    {}\n    return config\n"
    make = "from ml_collections import ConfigDict; config = ConfigDict({'name': NAME, 'own': ''})"
    (tmp_path / "inner.py").write_text(text.format("inner", make))
    (tmp_path / "outer.py").write_text(
        text.format("outer", f"config = load('{tmp_path / 'inner.py'}'); config.own = NAME")
    )
    assert load(str(tmp_path / "outer.py"), ["name=changed"]).to_dict() == {"name": "changed", "own": "outer"}


@pytest.mark.parametrize("variant", ["", "tiny"])
def test_the_full_world_fits_its_models_and_shows_what_it_can_say(variant):
    config = from_dict(QuickstartConfig, load(f"{CONFIGS / 'full_world.py'}:{variant}"))
    check_sizes(config)
    assert set(config.world.motions) == set(MOTIONS) and set(config.world.cameras) == set(CAMERAS)
    assert all(in_worlds_words(prompt) for prompt in config.show.prompts)
    passes = [any(s.motion == "pass" for s in scene(config.world, i).shapes) for i in range(1000)]
    assert 0.18 < np.mean(passes) < 0.28  # the share that its comment says


def test_a_prompt_with_what_no_file_name_holds_names_a_file():
    assert NO_NAME.sub("_", "a red/blue ring: it moves\nright") == "a_red_blue_ring__it_moves_right"
    assert NO_NAME.sub("_", "a circle, 红") == "a_circle,_红"


@pytest.mark.parametrize("size", ["xs", "s", "m", "b", "l"])
@pytest.mark.parametrize("compression", ["1x8x8", "2x4x4", "4x4x4", "4x8x8", "4x16x16", "8x8x8"])
def test_a_video_autoencoder_has_the_compression_of_its_name(size, compression):
    config = read("video_autoencoder.py", f"{size}_{compression}")
    assert "x".join(map(str, config.model.block[:2])) + f"x{config.model.block[2]}" == compression
    million = count(autoencoder_specs(config.model)) / 1e6
    if compression == "4x8x8":
        assert f"{million:8.2f} M" in (CONFIGS / "video_autoencoder.py").read_text()
    assert config.stages[2].trained == "decoder" and config.stage(1, Path()).start == "stage_1"


@pytest.mark.parametrize("size", SIZES)
def test_the_blocks_of_a_size_are_those_of_dit_and_its_cross_attention(size):
    model = read("transformer.py", size).model
    specs = denoiser_specs(model)["blocks"]
    cross = sum(count(specs[name]) for name in ("cross_q", "cross_kv", "cross_merge", "q_norm", "k_norm"))
    # DiT, 2212.09748: attention 4 D^2 + 4 D, MLP 8 D^2 + 5 D, adaLN-Zero 6 D^2 + 6 D
    assert count(specs) - cross == model.depth * (18 * model.width**2 + 15 * model.width)


# 2401.08740 has them in millions: 33, 130, 458 and 675.
@pytest.mark.parametrize(
    "size, parameters", [("S", 32_858_896), ("B", 130_303_504), ("L", 457_824_272), ("XL", 674_816_272)]
)
def test_sit_is_dit_without_a_learned_variance(size, parameters):
    model = read("sit.py", f"{size}/2").model
    assert count(denoiser_specs(model)) == parameters and not model.learned_variance
    # The last layer of DiT has another 16 outputs: width + 1 numbers each.
    dit = read("dit.py", f"{size}/2").model
    assert count(denoiser_specs(dit)) - parameters == 16 * (model.width + 1)


def test_the_recipe_of_sit_is_that_of_the_paper():
    """2401.08740, section 4: DiT's recipe on the velocity of a path, at uniform times."""
    for variant, process in (("S/2", "linear_flow"), ("S/2,trigonometric", "trigonometric")):
        run, dit = read("sit.py", variant), read("dit.py", "S/2")
        diffusion = run.diffusion
        assert (diffusion.process, diffusion.prediction, diffusion.weight.name) == (process, "velocity", "uniform")
        assert (diffusion.times.distribution, diffusion.times.base_tokens) == ("uniform", 0)
        assert diffusion.caption_dropout == 0.1
        assert (run.optim.ema, run.optim.ema_warmup, run.optim.learning_rate) == ((0.9999,), False, 1e-4)
        assert (run.optim, run.batch) == (dit.optim, 256)
        # Heun on the ODE at 250 evaluations (249: the last step has one), and no shift of the grid.
        assert (run.sampling.solver.name, run.sampling.spacing) == ("heun", "even")
        assert evaluations(run.sampling.solver, int(run.sampling.steps)) == 249


@pytest.mark.parametrize("variant", VARIANTS["walt.py"])
def test_the_recipe_of_walt_is_that_of_the_paper(variant):
    """2312.06662, section 4 and table 8: v-prediction with zero terminal SNR, and DDIM in 50 steps from t = 1 on."""
    run = read("walt.py", variant)
    diffusion, sampling = run.diffusion, run.sampling
    assert (diffusion.process, diffusion.prediction, diffusion.self_conditioning) == ("vp_linear_zero_snr", "v", 0.9)
    times = base_times(diffusion.process, sampling.steps, sampling.spacing)
    assert (sampling.solver.name, sampling.solver.eta, len(times), times[0], times[-1]) == ("ddim", 0, 51, 1, 0)
    assert run.model.self_conditioning and run.model.qk_norm and run.optim.schedule == "cosine"
    assert run.model.adaln_rank == {"imagenet": 0, "small": 16, "small_sr": 16}.get(variant, 2)
    assert run.optim.method == ("adafactor" if variant in ("t2v", "sr", "sr2") else "adamw")


def test_the_data_configs_are_valid_and_changed_by_the_command_line():
    path = CONFIGS / "data.py"
    for variant in ("video", "mixed", "navit", "labels"):
        config = from_dict(BuildConfig, load(f"{path}:{variant}"))
        assert config.sources and f"configs/data.py:{variant}" in path.read_text()
    changes = ["sources[1].path=elsewhere", "sources[2].weight=0.25", "max_tokens=99"]
    config = from_dict(BuildConfig, load(f"{path}:mixed", changes))
    assert [source.name for source in config.sources] == ["folder", "webdataset", "folder"]
    assert (config.sources[1].path, config.sources[2].weight, config.max_tokens) == ("elsewhere", 0.25, 99)
    with pytest.raises(UserError, match="sources"):
        load(f"{path}:mixed", ["sources[7].path=x"])


@pytest.mark.parametrize("variant", ["short", "tiny"])
def test_forms_of_the_quickstart_that_check_its_stages_say_so(variant):
    config = from_dict(QuickstartConfig, load(f"configs/quickstart.py:{variant}"))
    assert config.closing.endswith(": sora-jax quickstart")
    assert not from_dict(QuickstartConfig, load("configs/quickstart.py")).closing
    steps, warmup = config.transformer.loop.steps, config.transformer.optim.warmup_steps
    assert variant == "tiny" or warmup < steps / 5


def test_the_table_of_the_quickstart_fits_a_terminal(monkeypatch):
    monkeypatch.setattr(quickstart, "in_words", lambda clip: "a red circle that stands still beside " * 9)
    prompt, clip = "a red circle moves right on a plain white background", np.zeros((5, 24, 24, 3), np.uint8)
    lines = quickstart.table([prompt], [clip]).splitlines()
    assert max(map(len, lines)) < 160 and "a red circle that stands still beside a red ..." in lines[1]
