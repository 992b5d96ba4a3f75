"""Tasks: what is given stays, lengths are those asked for, company changes nothing, loops close."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_diffusion import quick_jit
from fixtures_runs import chain, run, trained, with_random_weights  # noqa: F401

from sora_jax.data.fit import fit_frames
from sora_jax.data.packing.packs import EmptyItem, Layout, PackingConfig, pack_batch
from sora_jax.data.reading.media import decode
from sora_jax.data.viewing.write import write_video
from sora_jax.diffusion.keys import Purpose, step_key
from sora_jax.diffusion.process import linear_flow
from sora_jax.diffusion.sampling import SamplingConfig, grid_times, sample
from sora_jax.diffusion.solvers import Problem
from sora_jax.diffusion.times import TimesConfig
from sora_jax.errors import UserError
from sora_jax.generate.recipe import read_recipe
from sora_jax.generate.requests import Request
from sora_jax.generate.sampler import _rolled, sample_latents
from sora_jax.generate.tasks import Tasks, pad
from sora_jax.models.first_stage import receptive_field
from sora_jax.nn.pack import Pack

SIZE = (9, 16, 24)
SETTINGS = SamplingConfig(steps="3")


@pytest.fixture(scope="module")
def model(trained):  # noqa: F811
    return with_random_weights(trained)


@pytest.fixture(scope="module")
def clip():
    rng = np.random.default_rng(1)
    video = rng.integers(0, 60, SIZE, dtype=np.uint8)[..., None] + np.zeros(3, np.uint8)
    for t in range(len(video)):
        video[t, 4:10, t : t + 6] = 200, 60, 90
    return video


def generate(model, *tasks, seed=3, prompts=("a red square moves right",)):
    prompts = list(prompts) * (len(tasks) if len(prompts) == 1 else 1)
    return model.generate(prompts, sampling=SETTINGS, seed=seed, guidance=2.0, tasks=tasks)


def reconstruction(model, clip):
    return next(iter(model.autoencoder.decode(model.autoencoder.encode([clip], 1), 1)))


def near(found, wanted):
    """Equal but for rounding to uint8 after float error."""
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1


def test_given_latents_are_in_the_sample_to_the_bit(model, clip):
    made = [Tasks(model).extend(clip, 8), Tasks(model).extend(clip, -5), Tasks(model).connect(clip, clip, 4)]
    requests = [Request("a red square", t.known.latent.shape[:3], i + 1, guidance=2.0, known=t.known)
                for i, t in enumerate(made)]  # fmt: skip
    with jax.set_mesh(model.mesh):
        latents = sample_latents(model, requests, SETTINGS, 0)
    for task, z in zip(made, latents, strict=True):
        given = task.known.ceiling == 0
        assert given.any() and (~given).any()
        np.testing.assert_array_equal(z[given], task.known.latent[given])
        assert np.isfinite(z).all()
        assert not np.isclose(z[~given], 0).all(-1).any()


def test_a_clip_is_continued_from_its_own_reconstruction(model, clip):
    (longer,) = generate(model, Tasks(model).extend(clip, 6))
    assert len(longer) == len(clip) + 6
    near(longer[: len(clip)], reconstruction(model, clip))
    # A short context leaves the frames before it as they are.
    (short,) = generate(model, Tasks(model, context=5).extend(clip, 6))
    np.testing.assert_array_equal(short[:4], clip[:4])
    near(short[4:9], reconstruction(model, clip[4:]))


def test_an_image_begins_a_clip(model, clip):
    (moving,) = generate(model, Tasks(model).animate(clip[:1], 9))
    assert moving.shape == clip.shape
    near(moving[:1], reconstruction(model, clip[:1]))
    (exact,) = generate(model, Tasks(model, keep_pixels=True).animate(clip[:1], 9))
    np.testing.assert_array_equal(exact[0], clip[0])
    near(exact[1:], moving[1:])


def test_three_seeds_share_an_ending(model, clip):
    """Compare seeds: frames are equal from where the decoder no longer sees what was made, and not before."""
    ending = np.concatenate([clip, clip[::-1]] * 3 + [clip])
    task = Tasks(model, context=len(ending)).extend(ending, -9)
    ends = [generate(model, task, seed=seed)[0] for seed in (1, 2, 3)]
    assert all(len(end) == 9 + len(ending) for end in ends)
    given, back = len(ending) // 4 * 4, 4 * int(np.ceil(receptive_field(model.autoencoder.config, "decode")[0]))
    assert back < given - 8
    shared = [end[9 + back : 9 + given] for end in ends]
    near(shared[1], shared[0])
    near(shared[2], shared[0])
    assert np.abs(ends[0][:9].astype(int) - ends[1][:9]).max() > 5
    np.testing.assert_array_equal(ends[0][9 + given :], ending[given:])


def test_a_connection_keeps_both_ends(model, clip):
    other = clip[::-1, :, ::-1].copy()
    (whole,) = generate(model, Tasks(model, keep_pixels=True).connect(clip, other, 4))
    assert len(whole) == 2 * len(clip) + 4
    np.testing.assert_array_equal(whole[: len(clip)], clip)
    np.testing.assert_array_equal(whole[len(clip) + 4 :], other)


def test_what_lies_outside_a_mask_is_kept(model, clip):
    mask = np.zeros((1, 16, 24), bool)
    mask[:, :4, :4] = True
    task = Tasks(model, keep_pixels=True).fill(clip, mask)
    given = task.known.ceiling == 0
    assert not given[:, :2, :2].any() and given[:, 2:].all() and given[:, :, 2:].all()
    (found,) = generate(model, task)
    np.testing.assert_array_equal(found[:, 12:], clip[:, 12:])
    assert np.abs(found[:, :4, :4].astype(int) - clip[:, :4, :4]).max() > 5
    # What was under the mask is not seen.
    other = clip.copy()
    other[:, :4, :4] = 255
    near(generate(model, Tasks(model, keep_pixels=True).fill(other, mask))[0], found)


def test_padding_makes_new_sides(model, clip):
    task = Tasks(model, keep_pixels=True).fill(*pad(clip, 8, 0, 0, 8))
    (found,) = generate(model, task)
    assert found.shape == (9, 24, 32, 3)
    np.testing.assert_array_equal(found[:, :10, 14:], clip[:, :10, 6:])


def test_strength_0_is_the_reconstruction_and_strength_1_the_plain_sample(model, clip):
    kept, new = generate(model, Tasks(model).edit(clip, 0.0), Tasks(model).edit(clip, 1.0))
    near(kept, reconstruction(model, clip))
    plain = model.generate(["a"] * 2, SIZE, sampling=SETTINGS, seed=3, guidance=2.0)
    edits = generate(model, Tasks(model).edit(clip, 1.0), prompts=("a", "a"))
    np.testing.assert_array_equal(np.stack(edits), np.stack(plain))
    assert np.abs(new.astype(int) - kept).max() > 5
    # A table of ceilings that are all 1 is the same, in a program that knows of given tokens.
    known = dataclasses.replace(Tasks(model).edit(clip, 0.5).known, ceiling=np.ones((3, 4, 6), np.float32))
    requests = [Request("a", (3, 4, 6), 1, guidance=2.0, known=known), Request("a", (3, 4, 6), 1, guidance=2.0)]
    with jax.set_mesh(model.mesh):
        one, other = (sample_latents(model, [request], SETTINGS, 3)[0] for request in requests)
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_change_of_prompt_changes_the_clip_and_the_same_prompt_does_not(model, clip):
    """In packs with other clips, and with guidance; the source comes back to the bit."""
    words, tasks = ("a red square moves right", "a blue square moves down"), Tasks(model)
    requests = [
        Request(words[0], (3, 4, 6), 1, guidance=3.0, known=tasks.rewrite(clip, words[0]).known),
        Request(words[1], (3, 4, 6), 2, guidance=3.0, known=tasks.rewrite(clip, words[0]).known),
        Request(words[1], (3, 4, 6), 3, guidance=3.0, known=tasks.rewrite(clip, words[0], 0.3).known),
        Request(words[1], (3, 4, 6), 4, guidance=3.0),
    ]
    with jax.set_mesh(model.mesh):
        same, changed, little, other = sample_latents(model, requests, SETTINGS, 0)
        (plain,) = sample_latents(model, requests[3:], SETTINGS, 0)
    source = requests[0].known.latent
    np.testing.assert_array_equal(same, source)
    assert np.abs(changed - source).mean() > np.abs(little - source).mean() > 1e-3
    np.testing.assert_allclose(other, plain, atol=1e-4)


def test_tasks_of_all_kinds_travel_together(model, clip):
    """A clip's result is that of its single run, and a pack-mate's strength does not matter."""
    made = Tasks(model)
    mask = np.zeros((1, 16, 24), bool)
    mask[:, :8, :8] = True
    tasks = [made.extend(clip, 4), made.loop((8, 16, 24)), made.fill(clip, mask), made.edit(clip, 0.5)]
    together = generate(model, *tasks)
    for number, task in enumerate(tasks):
        (alone,) = model.generate(
            ["a red square moves right"], sampling=SETTINGS, seed=3, guidance=2.0, tasks=[task], clip_ids=[number + 1]
        )
        near(alone, together[number])
    others = generate(model, *tasks[:3], made.edit(clip, 0.9))
    for one, other in zip(together[:3], others[:3], strict=True):
        near(one, other)
    assert np.abs(together[3].astype(int) - others[3]).max() > 5


def test_loops_have_the_frames_asked_for(model, clip):
    text, closed = generate(model, Tasks(model).loop((8, 16, 24)), Tasks(model).close(clip, 4))
    assert text.shape == (8, 16, 24, 3)
    assert closed.shape == (12, 16, 24, 3)
    with pytest.raises(UserError, match="--frames is 9; it must be a multiple of 4, such as 8 or 12"):
        Tasks(model).loop((9, 16, 24))


# ----------------------------------------------------------------------------------------------------------
# The exact model of an open time axis, sampled as a ring
# ----------------------------------------------------------------------------------------------------------

RING, CLIPS = 13, 400
DISTANCE = np.abs(np.subtract.outer(np.arange(RING), np.arange(RING)))
OPEN = {"ar": 0.9**DISTANCE, "smooth": np.exp(-(DISTANCE**2) / 18.0)}


@functools.partial(quick_jit, static_argnums=(0, 1))
def ring(covariance, rolls):
    """Clips (CLIPS, RING) of one number a frame, by the exact model of `covariance` in the order of coordinates."""
    layout = Layout(
        np.stack([1.0 + np.arange(RING), *np.zeros((2, RING))], 1).astype(np.float32), np.zeros(RING, np.int32)
    )
    item = EmptyItem((RING, 1, 1), 1, np.array([1]), layout=layout)
    one = pack_batch([[item]], PackingConfig(RING, 1, 4, (1, 1, 1)))
    pack = Pack(**{name: jnp.repeat(jnp.asarray(values), CLIPS, 0) for name, values in one.items()})
    matrix, config, times = jnp.asarray(OPEN[covariance], jnp.float32), SamplingConfig("50"), TimesConfig(base_tokens=0)
    times_KBR = grid_times(config, times, linear_flow, jnp.ones((CLIPS, 1), jnp.int32))

    def denoise(x_BLP, t_BR):
        t, at = t_BR[0, 0], pack
        if rolls:
            at = _rolled(pack, jnp.full((CLIPS, 1), RING), times_KBR, t_BR)
        order = at.coords_BL3[0, :, 0].astype(jnp.int32) - 1
        own = matrix[order][:, order]
        gain = (1 - t) * own @ jnp.linalg.inv((1 - t) ** 2 * own + t**2 * jnp.eye(RING))
        x0 = jnp.einsum("ij,bjp->bip", gain, x_BLP)
        return (x_BLP - (1 - t) * x0) / jnp.maximum(t, 1e-6) - x0

    eps_BLP = jax.random.normal(step_key(0, 0, Purpose.SAMPLE), (CLIPS, RING, 1))
    problem = Problem(denoise, "velocity", linear_flow, pack.rows_BL)
    return sample(config, times, problem, eps_BLP, jnp.ones((CLIPS, 1), jnp.int32))[..., 0]


@pytest.mark.parametrize("covariance", OPEN)
def test_rolling_the_time_axis_closes_the_ring(covariance):
    def closure(x):
        steps = np.square(np.diff(np.concatenate([x, x[:, :1]], 1), axis=1)).mean(0)
        return steps[-1] / np.median(steps[:-1])

    assert closure(np.asarray(ring(covariance, False))) > 5
    assert abs(closure(np.asarray(ring(covariance, True))) - 1) < 0.1


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory, clip):
    folder = tmp_path_factory.mktemp("tasks")
    write_video(folder / "clip.mp4", clip, 6.0)
    write_video(folder / "image.png", clip[:1], 6.0)
    mask = np.zeros((1, 16, 24, 3), np.uint8)
    mask[:, :8, :8] = 255
    write_video(folder / "mask.png", mask, 6.0)
    return folder


def test_the_command_does_each_task(chain, files):  # noqa: F811
    video = f"--video={files / 'clip.mp4'}"
    cases = {
        "extend": ([video, "--extend=+5"], (14, 16, 24)),
        "before": ([video, "--extend=-5"], (14, 16, 24)),
        "animate": ([f"--image={files / 'image.png'}", "--frames=5"], (5, 16, 24)),
        "connect": ([f"--connect={files / 'clip.mp4'},{files / 'clip.mp4'}", "--gap=4"], (22, 16, 24)),
        "loop": (["--loop", "--frames=8", "--height=16", "--width=16"], (8, 16, 16)),
        "close": ([video, "--loop", "--gap=4"], (12, 16, 24)),
        "mask": ([video, f"--mask={files / 'mask.png'}", "--keep-pixels"], (9, 16, 24)),
        "pad": ([video, "--pad=8,0,0,0"], (9, 16, 32)),
        "edit": ([video, "--strength=0.5"], (9, 16, 24)),
        "draft": (["--draft=0.5", "--frames=5", "--height=32", "--width=32"], (5, 32, 32)),
        "rewrite": ([video, "--from-prompt=a blue square", "--strength=0.5"], (9, 16, 24)),
    }
    for name, (options, shape) in cases.items():
        out = files / f"{name}.mp4"
        common = [f"--workdir={chain.transformer}", f"--out={out}", "--steps=2", "--upscale=1"]
        common += ["--prompt=a red square"]
        assert run("sample", *common, *options) == 0, name
        made = decode(out)
        assert made.frames.shape[:3] == shape, name
        assert made.fps == (8.0 if name in ("animate", "loop", "draft") else 6.0), name


@pytest.mark.parametrize(
    "options, message",
    [
        (["--video=CLIP"], "--video is given with nothing that is done with it; give one of --extend, --loop"),
        (["--video=CLIP", "--loop", "--strength=0.5"], "--video is given with --loop and --strength; give one of"),
        (["--video=CLIP", "--image=CLIP"], "--image and --video are given; give one of them"),
        (["--extend=4"], "--extend is given without --video; it is for a clip named by --video"),
        (["--video=CLIP", "--extend=4", "--frames=9"], "--frames is 9; with --extend it has no effect"),
        (["--video=CLIP", "--extend=4", "--gap=4"], "--gap is 4; it is for --connect"),
        (["--video=CLIP", "--pad=5,0,0,0"], "it makes the width 29, which must be a multiple of 8, such as 24 or 32"),
        (["--video=CLIP", "--extend=4", "--out=CLIP"], "that file is read, give another name"),
        (["--connect=CLIP"], "it must be two files with a comma between"),
        (["--video=CLIP", "--pad=1,2"], "--pad is '1,2'; it must be four numbers of pixels"),
        (["--video=CLIP", "--strength=1.5"], "--strength is 1.5; it must be from 0 to 1"),
        (["--video=nowhere.mp4", "--extend=4"], "--video is 'nowhere.mp4'; it cannot be read"),
        (["--video=CLIP", "--extend=0"], "--extend is 0; it must be a number of frames"),
        (["--loop", "--frames=7"], "--frames is 7; it must be a multiple of 4, such as 4 or 8"),
        (["--image=CLIP", "--loop"], "--loop is given beside --image; it is for a clip named by --video"),
        (["--image=CLIP", "--mask=CLIP", "--pad=4,0,0,0"], "--mask and --pad are given; give one of them"),
        (["--from-prompt=a fox"], "--from-prompt is given without --video"),
        (["--video=CLIP", "--pad=0,0,0,0"], "nothing is to be made"),
        (["--video=CLIP", "--loop", "--gap=5"], "--gap is 5; it must be a multiple of 4, such as 4 or 8"),
        (["--image=CLIP", "--draft=0.5"], "--draft is given with an option for clips"),
        (["--video=CLIP", "--extend=4", "--out=a.png"], "a clip of several frames needs .mp4"),
    ],
)
def test_mistakes_are_told_in_a_sentence(chain, files, capfd, options, message):  # noqa: F811
    options = [option.replace("CLIP", str(files / "clip.mp4")) for option in options]
    code = run("sample", f"--workdir={chain.transformer}", "--prompt=a", f"--out={files / 'no.mp4'}", *options)
    told = capfd.readouterr().err
    assert code == 2 and message in told, told
    assert "Traceback" not in told
    assert not (files / "no.mp4").exists()


def test_a_draft_is_what_the_clip_is_made_of(model, clip, chain, tmp_path):  # noqa: F811
    """At the lowest noise level it is the enlarged draft, through the autoencoder, at the highest the plain clip."""
    (large,) = generate(model, Tasks(model).enlarge(clip, (9, 32, 48), 1e-6))
    near(large, reconstruction(model, fit_frames(clip, (32, 48))))
    common = [f"--workdir={chain.transformer}", "--steps=2", "--prompt=a red square", "--frames=5", "--fps=8"]

    def made(name, *options):
        assert run("sample", *common, *options, f"--out={tmp_path / name}.gif") == 0
        return decode(tmp_path / f"{name}.gif").frames.astype(int)

    size = ("--height=32", "--width=48")
    plain = made("plain", *size)
    np.testing.assert_array_equal(made("all", *size, "--draft=1"), plain)
    assert np.abs(made("weak", *size, "--draft=0.3") - plain).mean() > 5


@pytest.mark.parametrize("ending", ["mp4", "gif", "webp"])
def test_a_file_is_made_again_from_its_own_recipe(chain, files, tmp_path, ending):  # noqa: F811
    """Make the second of two clips of a command again, from its metadata, and from the file beside it."""
    common = [f"--workdir={chain.transformer}", "--steps=2", "--seed=7", "--sampling.guidance.rescale=0.5"]
    prompts = ["--prompt=a red square, moves", '--prompt=a "green" square é']
    out = tmp_path / f"clip.{ending}"
    assert run("sample", *common, *prompts, f"--video={files / 'clip.mp4'}", "--extend=4", f"--out={out}") == 0
    second, again = tmp_path / f"clip_001.{ending}", tmp_path / f"again.{ending}"

    def same(file):
        """The bytes are equal; of an mp4 x264 now and then codes equal frames otherwise."""
        if ending == "mp4":
            assert np.abs(decode(file).frames.astype(int) - decode(second).frames).max() <= 8
        else:
            assert file.read_bytes() == second.read_bytes()

    assert run("sample", f"--like={second}", f"--out={again}") == 0
    same(again)
    again.unlink()
    bare = tmp_path / f"bare.{ending}"
    write_video(bare, decode(second).frames, 6.0)  # its metadata are lost
    second.with_name(f"{second.name}.json").rename(bare.with_name(f"{bare.name}.json"))
    assert run("sample", f"--like={bare}", f"--out={again}") == 0
    same(again)


def test_a_recipe_knows_its_inputs(chain, clip, tmp_path, capfd):  # noqa: F811
    first, made = tmp_path / "first.png", tmp_path / "made.gif"
    write_video(first, clip[:1], 6.0)
    common = [f"--workdir={chain.transformer}", "--steps=2", "--frames=5", "--prompt=a red square"]
    assert run("sample", *common, f"--image={first}", f"--out={made}") == 0
    assert list(read_recipe(made)["inputs"]) == [str(first)]
    write_video(first, clip[1:2], 6.0)
    assert run("sample", f"--like={made}", f"--out={tmp_path / 'no.gif'}") == 2
    assert f"its input '{first}' is gone or has changed" in capfd.readouterr().err


def test_an_image_keeps_its_recipe_and_changes_are_taken(chain, tmp_path, capfd):  # noqa: F811
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    common = [f"--workdir={chain.transformer}", "--steps=2", "--size=16", "--prompt=a red square"]
    assert run("sample", *common, f"--out={one}") == 0
    assert run("sample", f"--like={one}", "--seed=3", f"--out={other}") == 0
    assert read_recipe(other)["seed"] == 3 and read_recipe(other)["prompt"] == "a red square"
    assert other.read_bytes() != one.read_bytes()
    for option in ("--prompt=a", "--prompts-file=a.txt", "--expand=world"):
        assert run("sample", f"--like={one}", option, f"--out={other}") == 2
        assert f"--like is given with {option.split('=')[0]}" in capfd.readouterr().err
    (tmp_path / "text.mov").write_text("no clip")
    assert run("sample", f"--like={tmp_path / 'text.mov'}", f"--out={other}") == 2
    assert "it holds no recipe" in capfd.readouterr().err
    write_video(other, np.zeros((1, 16, 16, 3), np.uint8), 8.0)
    other.with_name("other.png.json").unlink()
    assert run("sample", f"--like={other}", f"--out={one}") == 2
    assert "it holds no recipe" in capfd.readouterr().err


def test_a_table_of_prompts_says_more_of_each_clip(chain, tmp_path, capfd):  # noqa: F811
    """A row's values are those of the options of a command for that clip alone."""
    size = ["--upscale=1", "--height=16", "--width=24", "--frames=5"]
    common = [f"--workdir={chain.transformer}", "--steps=2", *size]
    (tmp_path / "rows.csv").write_text('prompt,frames,guidance,clip_id\na red square,9,1,1\n"a blue, square",,,1\n')
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a red square", "frames": 9, "guidance": 1, "clip_id": 1}\n')
    out = tmp_path / "table.gif"
    assert run("sample", *common, f"--prompts-file={tmp_path / 'rows.csv'}", f"--out={out}") == 0
    first, second = (decode(tmp_path / f"table_{i:03d}.gif").frames.astype(int) for i in range(2))
    assert first.shape == (9, 16, 24, 3) and second.shape == (5, 16, 24, 3)
    assert run("sample", *common[:-1], "--frames=9", "--guidance=1", "--prompt=a red square", f"--out={out}") == 0
    assert np.abs(decode(out).frames - first).max() <= 1
    assert run("sample", *common, f"--prompts-file={tmp_path / 'rows.jsonl'}", f"--out={out}") == 0
    assert np.abs(decode(out).frames - first).max() <= 1
    again = tmp_path / "again.gif"
    assert run("sample", f"--like={tmp_path / 'table_001.gif'}", f"--out={again}") == 0
    assert again.read_bytes() == (tmp_path / "table_001.gif").read_bytes()
    (tmp_path / "rows.csv").unlink()  # the recipe holds what it said
    assert run("sample", f"--like={tmp_path / 'table_001.gif'}", f"--out={again}") == 0
    assert again.read_bytes() == (tmp_path / "table_001.gif").read_bytes()
    for text, message in [
        ("prompt,seed\na,1\n", "row 1 has a column 'seed'; allowed: prompt, negative"),
        ("prompt,frames\na,x\n", "row 1 has a value of the wrong kind"),
        ("frames\n9\n", "row 1 has no prompt"),
    ]:
        (tmp_path / "rows.csv").write_text(text)
        assert run("sample", *common, f"--prompts-file={tmp_path / 'rows.csv'}", f"--out={out}") == 2
        assert message in capfd.readouterr().err
