"""Say in a line, at every door, what a run does not read or has not learnt."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures_caches import clip_row, write_cache
from fixtures_runs import CLIPS, TINY, chain, run, trained  # noqa: F401

from sora_jax.config import from_dict, load
from sora_jax.data.feeding.tokenizer import Reading
from sora_jax.data.storing.latents import LatentCache
from sora_jax.errors import UserError
from sora_jax.generate import command
from sora_jax.generate.doubts import Learnt
from sora_jax.generate.preview import own_preview
from sora_jax.generate.requests import Known, Request
from sora_jax.kinds import denoiser as kind
from sora_jax.parallel.mesh import make_mesh
from sora_jax.train import seen as seen_data
from sora_jax.train.denoiser import DenoiserRun
from sora_jax.train.seen import ClipSize, Seen, look, read_seen, save_seen, words_of

LONG = "a red square moves right " * 4
REQUEST = Request("a red square moves right", (2, 4, 6), 1, guidance=3.0)


def described(source: str) -> Known:
    """A clip of the size of REQUEST that a prompt describes, as --from-prompt does."""
    return Known(np.zeros((2, 4, 6, 4), np.float32), np.ones((2, 4, 6), np.float32), source=source)


@pytest.fixture(scope="module")
def learnt(trained):  # noqa: F811
    return trained.learnt


def doubts(learnt, **changes):
    return learnt.doubts([dataclasses.replace(REQUEST, **changes)])


def test_a_run_keeps_what_it_has_seen(chain, learnt):  # noqa: F811
    """The chain trains on five clips of 9x16x24 and 5x24x16 pixels."""
    found = learnt.seen
    assert (found.frames, found.height, found.width) == ((5, 9), (16, 24), (16, 24))
    assert found.tokens == (12, 18) and found.aspect == (16 / 24, 24 / 16)
    assert found.clips == found.of == 5 and found.left_out == 0
    assert found.words == ("a", "blue", "down", "green", "grey", "left", "moves", "red", "right", "square", "up",
                           "waits", "white")  # fmt: skip
    assert found == read_seen(chain.transformer)


def test_what_is_as_in_training_is_not_doubted(learnt):
    assert doubts(learnt) == []
    assert doubts(learnt, negative="a GREEN square!".replace("!", "")) == []
    assert doubts(learnt, size=(3, 6, 4)) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(prompt=LONG), ["prompt 'a red", "has 20 tokens; this run reads the first 16"]),
        (dict(negative=LONG), ["negative prompt 'a red", "has 20 tokens; this run reads the first 16"]),
        (dict(prompt=f"0: a red square 24: {LONG}"), ["prompt 'a red", "has 20 tokens"]),
        (dict(prompt="a 狐狸 moves"), ["prompt 'a 狐狸 moves' has words that the tokenizer", "does not know: '狐狸'"]),
        (dict(negative="a 狐狸 moves"), ["negative prompt 'a 狐狸 moves' has words"]),
        (dict(prompt="a white horse"), ["no caption of training has 'horse', which a prompt has"]),
        (dict(negative="horse"), ["no caption of training has 'horse', which a negative prompt has"]),
        (
            dict(known=described(LONG)),
            ["prompt of the given clip 'a red", "has 20 tokens; this run reads the first 16"],
        ),
        (dict(prompt=" "), ["prompt is ''; it is the null caption"]),
        (dict(size=(10, 16, 12)), ["9x", "480 tokens; the clips of training had 12 to 18 tokens", "frames 5 to 9"]),
        (dict(size=(2, 8, 12)), ["5x32x48 has 48 tokens", "so the clip may be poor"]),
        (dict(size=(1, 4, 4)), ["1x16x16 has 4 tokens", "so expect noise"]),
        (dict(size=(1, 2, 12)), ["1x8x48 has 6 tokens", "so expect noise"]),
    ],
)
def test_each_doubt_is_one_line(learnt, changes, words):
    found = doubts(learnt, **changes)
    assert len(found) == 1, found
    assert all(word.replace("9x", "37x") in found[0] for word in words), found


def test_equal_tokens_of_different_prompts_never_pass_unsaid(learnt):
    """Row 10: the same ids for a fox and a cat are said; where nothing is known, both are refused."""
    for one, other in (("a 狐狸", "a 小猫"), ("狐狸", "小猫"), ("красный круг", "зелёный круг"), ("🐙", "🦊")):
        requests = [dataclasses.replace(REQUEST, prompt=text) for text in (one, other)]
        ids = [learnt.tokenizer.encode(request.prompt).tolist() for request in requests]
        if one.startswith("a "):
            assert ids[0] == ids[1]
            learnt.check_spelt(requests)
            assert len(learnt.doubts(requests)) == 2
        else:
            with pytest.raises(UserError, match=f"prompt is '{one}'; the tokenizer of this run knows none of its"):
                learnt.check_spelt(requests)
    with pytest.raises(UserError, match="negative prompt is 'красный'; .* \\(Cyrillic\\): .*tokenizer.kind = 'bytes'"):
        learnt.check_spelt([dataclasses.replace(REQUEST, negative="красный")])


def test_many_texts_make_one_line(learnt):
    requests = [dataclasses.replace(REQUEST, prompt=f"{LONG}{word}") for word in "a red green blue white".split()]
    (line,) = learnt.doubts(requests)
    assert line == "5 of 5 prompts have up to 21 tokens; this run reads the first 16"
    assert len(learnt.doubts(requests[:3])) == 3


def test_guidance_of_a_run_that_never_dropped_captions(learnt):
    diffusion = dataclasses.replace(learnt.config.diffusion, caption_dropout=0.0)
    config = dataclasses.replace(learnt.config, diffusion=diffusion)
    assert doubts(dataclasses.replace(learnt, config=config)) == []  # it did before this field was changed
    never = dataclasses.replace(learnt, config=config, seen=dataclasses.replace(learnt.seen, dropped=False))
    (line,) = doubts(never)
    assert line.startswith("guidance is 3; the run never dropped its captions (diffusion.caption_dropout is 0)")
    assert doubts(never, guidance=1.0) == doubts(never, negative="a red square") == []


def test_a_run_has_seen_what_the_run_that_it_began_with_has(chain, learnt, tmp_path):  # noqa: F811
    """`--init-from`: the words and sizes of both; of weights whose training is not known, nothing is said."""
    began = {"init.weights": str(tmp_path), "diffusion.caption_dropout": 0.0}
    config, cache = config_of(chain, **began), LatentCache(chain.latents)
    assert kind._look(config, cache, tmp_path / "new") is None
    unknown = Learnt(config, learnt.first_stage, learnt.tokenizer, None)
    assert doubts(unknown, prompt="a horse", size=(9, 40, 40)) == []
    base = dataclasses.replace(learnt.seen, words=("a", "fox"), frames=(1, 33), tokens=(2, 90), aspect=(0.1, 1.0))
    save_seen(base, tmp_path)
    both = kind._look(config, cache, tmp_path / "new")
    assert "fox" in both.words and "square" in both.words and both.dropped
    assert (both.frames, both.tokens, both.aspect, both.of) == ((1, 33), (2, 90), (0.1, 1.5), 10)
    save_seen(dataclasses.replace(base, dropped=False), tmp_path)
    assert not kind._look(config, cache, tmp_path / "new").dropped
    assert kind._look(config_of(chain, **{"init.weights": str(tmp_path)}), cache, tmp_path / "new").dropped


def test_runs_of_earlier_versions_are_silent(learnt, tmp_path):
    assert read_seen(tmp_path) is None
    old = dataclasses.replace(learnt, seen=None)
    assert doubts(old, prompt="a horse", size=(9, 40, 40)) == []


def test_words_and_letters():
    assert words_of("A ﬁne, Red-ish circle; don't 3") == ["a", "fine", "red", "ish", "circle", "don", "t", "3"]
    assert words_of("红色的圆 ok") == ["红", "色", "的", "圆", "ok"]  # no blanks to part words


def test_what_is_seen_is_bounded_and_says_so(tmp_path, monkeypatch):
    rows = [clip_row(n, (1, 2, 2), {"original": f"a word{n:03d}"}) for n in range(40)]
    cache = write_cache(tmp_path / "cache", rows)
    monkeypatch.setattr(seen_data, "MOST_CLIPS", 10)
    some = look(cache, "train", (1, 2, 2))
    assert (some.clips, some.of, len(some.words)) == (10, 40, 11)
    assert some.captions == "no caption of training of 10 clips that were looked at has"
    monkeypatch.setattr(seen_data, "MOST_WORDS", 3)
    few = look(cache, "train", (1, 2, 2))
    assert len(few.words) == 3 and "a" in few.words and few.left_out == 8
    assert few.captions.startswith("the 3 most frequent words of the captions of training are without")
    save_seen(few, tmp_path)
    assert read_seen(tmp_path) == few


def test_a_size_is_far_from_twice_the_largest_and_from_half_the_smallest_on():
    seen = Seen((6, 27), (1, 9), (16, 48), (16, 48), (0.5, 2.0), 1, 1, ())
    assert seen.distance(ClipSize(6, 1, 16, 16)) == seen.distance(ClipSize(27, 9, 48, 48)) == 1.0
    assert not seen.is_far(ClipSize(53, 17, 95, 95)) and not seen.is_far(ClipSize(4, 1, 9, 9))
    for size in (ClipSize(54, 9, 48, 48), ClipSize(27, 18, 48, 48), ClipSize(27, 9, 96, 95), ClipSize(27, 9, 8, 15)):
        assert seen.is_far(size) and seen.distance(size) == 2.0, size
    assert seen.is_far(ClipSize(27, 9, 9, 40)) and seen.distance(ClipSize(27, 9, 8, 48)) == 3.0


# ----------------------------------------------------------------------------------------------------------
# The doors
# ----------------------------------------------------------------------------------------------------------


def test_python_warns(trained):  # noqa: F811
    sizes = dict(sizes=(5, 24, 16), steps=1)
    with pytest.warns(UserWarning) as told:
        trained.generate([LONG], **sizes, negative="a horse")
    lines = [str(each.message) for each in told if each.category is UserWarning]
    assert len(lines) == 2 and "this run reads the first 16" in lines[0] and "'horse'" in lines[1]
    assert told[0].filename == __file__
    with pytest.raises(
        UserError, match="prompt is '红色'; the tokenizer of this run knows none of its words \\(CJK\\)"
    ):
        trained.generate(["红色"], **sizes)


@pytest.mark.parametrize(
    "step, last, said",
    [
        (16, 1500, "16 of 1,500: expect noise"),
        (1000, 1500, "1,000 of 1,500"),
        (1500, 1500, "1500"),
        (0, 9, "0"),  # converted weights
    ],
)
def test_weights_of_an_unfinished_training_are_told(step, last, said):
    loop = SimpleNamespace(steps=last)
    assert command._of_training(SimpleNamespace(step=step, config=SimpleNamespace(loop=loop))) == said


def test_the_command_says_each_thing_once(chain, tmp_path, capfd):  # noqa: F811
    common = ["sample", f"--workdir={chain.transformer}", "--steps=1", f"--out={tmp_path / 'a.png'}"]
    prompts = [f"--prompt={LONG}", f"--prompt={LONG}", "--prompt=a 狐狸", "--prompt="]
    assert run(*common, *prompts, "--height=16", "--width=24") == 0
    told = capfd.readouterr().err
    for words in ("has 20 tokens; this run reads the first 16", "does not know: '狐狸'", "it is the null caption"):
        assert told.count(words) == 1, (words, told)
    for option in ("--prompt=красный круг", "--negative=一只"):
        code = run(*common, "--prompt=a red square", option)
        told = capfd.readouterr().err
        assert code == 2 and "knows none of its words" in told and "weights of step" not in told


def config_of(chain, **changes) -> DenoiserRun:  # noqa: F811
    changes = {"latents": str(chain.latents)} | changes
    return from_dict(DenoiserRun, load(f"{TINY}:transformer", [f"{name}={value}" for name, value in changes.items()]))


def note_of(config, workdir) -> str:
    inputs = kind.open_inputs(config, workdir, make_mesh())
    return kind.make_job(config, inputs, workdir).note


def test_the_start_of_a_training_says_what_is_cut_and_what_previews_ask_for(chain, tmp_path):  # noqa: F811
    sizes = {"preview.sizes": "((9,16,24),)"}
    assert note_of(config_of(chain), tmp_path).count("\n") == 0
    cut = {"tokenizer.max_tokens": 4, "preview.prompts": "('a red horse waits',)"} | sizes
    found = note_of(config_of(chain, **cut), tmp_path).splitlines()
    assert (
        "4 of 5 captions are cut at tokenizer.max_tokens = 4; the longest has 5 tokens: 5 would hold them all" in found
    )
    assert any(line.startswith("preview: prompt 'a red horse waits' has ") for line in found)
    assert any(line.startswith("preview: no caption of training has 'horse'") for line in found)
    never = {"diffusion.caption_dropout": 0.0}
    assert "--config.diffusion.caption_dropout=0.1" in note_of(config_of(chain, **never), tmp_path)
    unguided = never | {"sampling.guidance.scale": 1.0}
    assert note_of(config_of(chain, **unguided), tmp_path).count("\n") == 0
    with pytest.raises(
        UserError, match="^--config.preview.prompts: prompt is '红色的圆'; the tokenizer of this run knows none"
    ):
        note_of(config_of(chain, **{"preview.prompts": "('红色的圆',)"} | sizes), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_captions_that_an_encoder_cuts_are_counted():
    """As `data encode --text-encoder` does; each caption of a clip counts."""
    from sora_jax.data.feeding.texts import CaptionCounts
    from sora_jax.train.encode import _count_captions

    class Encoder:
        """An encoder that reads four letters, and knows no digit."""

        max_tokens = 4

        def read(self, text):
            return Reading(text, len(text), 4, tuple(letter for letter in text if letter.isdigit()))

    counts = CaptionCounts()
    for captions in (["four", "seven77"], [], ["ab"]):
        counts = _count_captions(Encoder(), [{"captions": captions}], counts)
    cut, unknown = counts.notes("--text-tokens", 4)
    assert cut == "1 of 3 captions are cut at --text-tokens = 4; the longest has 7 tokens: 7 would hold them all"
    assert unknown.startswith("1 of 3 captions have letters that the tokenizer does not know")
    assert _count_captions(None, [{"captions": ["a"]}], counts) == counts


def test_letters_beyond_the_vocabulary_are_counted(tmp_path):
    from sora_jax.data.feeding.texts import TokenizedCaptions
    from sora_jax.data.feeding.tokenizer import TokenizerConfig, train

    captions = ["a red circle 红", "a red circle", "красный", "a circle"]
    rows = [clip_row(n, (1, 2, 2), {"original": caption, "other": "a red"}) for n, caption in enumerate(captions)]
    cache, tokenizer = write_cache(tmp_path / "cache", rows), train(captions[1::2], TokenizerConfig(vocab=24))
    some = lambda *clips: np.array(clips)  # noqa: E731
    texts = TokenizedCaptions(cache, tokenizer, tmp_path / "kept")
    (note,) = texts.notes(some(0, 1, 2, 3))
    assert note.startswith("2 of 8 captions have letters that the tokenizer does not know")
    assert texts.notes(some(1, 3)) == [] and texts.notes(some(3, 0))[0].startswith("1 of 4 ")
    texts.flush()
    assert TokenizedCaptions(cache, tokenizer, tmp_path / "kept").notes(some(0, 1, 2, 3)) == [note]
    (tmp_path / "kept" / "uncut.npy").unlink()  # as earlier versions kept it
    assert TokenizedCaptions(cache, tokenizer, tmp_path / "kept").notes(some(0)) == []


# ----------------------------------------------------------------------------------------------------------
# The noise of one of several clips
# ----------------------------------------------------------------------------------------------------------


def test_one_of_several_clips_is_made_alone(chain, tmp_path):  # noqa: F811
    common = ["sample", f"--workdir={chain.transformer}", "--steps=2", "--height=16", "--width=24", "--frames=1"]
    prompts = ["--prompt=a red square", "--prompt=a blue square", "--prompt=a green square"]
    assert run(*common, *prompts, f"--out={tmp_path / 'all.png'}") == 0
    third = (tmp_path / "all_002.png").read_bytes()
    recipe = json.loads((tmp_path / "all_002.png.json").read_text())
    assert recipe["clip_id"] == 3

    def made(*options) -> np.ndarray:
        assert run(*common, prompts[2], *options, f"--out={tmp_path / 'one.png'}") == 0
        return pixels(tmp_path / "one.png")

    assert np.abs(made("--clip=3") - pixels(tmp_path / "all_002.png")).max() == 0
    assert np.abs(made() - pixels(tmp_path / "all_002.png")).max() > 2
    made("--clip=3")
    assert run("sample", f"--like={tmp_path / 'one.png'}", f"--out={tmp_path / 'again.png'}") == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    assert run("sample", f"--like={tmp_path / 'all_002.png'}", f"--out={tmp_path / 'again.png'}") == 0
    assert (tmp_path / "again.png").read_bytes() == third
    assert run(*common, *prompts[1:], "--clip=2,3", f"--out={tmp_path / 'two.png'}") == 0
    assert np.abs(pixels(tmp_path / "two_001.png") - pixels(tmp_path / "all_002.png")).max() == 0


def pixels(path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--clip=3,4"], "--clip is '3,4'; give a number for each clip, of which there are 1"),
        (["--clip=0"], "--clip is '0'; it must be whole numbers from 1 to 4294967295"),
        (["--clip=x"], "--clip is 'x'; it must be whole numbers from 1"),
    ],
)
def test_a_clip_that_cannot_be_is_refused(chain, tmp_path, capfd, options, message):  # noqa: F811
    out = f"--out={tmp_path / 'a.png'}"
    assert run("sample", f"--workdir={chain.transformer}", "--prompt=a red square", out, *options) == 2
    assert message in capfd.readouterr().err


def test_previews_show_clips_that_are_held_out_and_else_those_of_training(chain):  # noqa: F811
    cache = LatentCache(chain.latents)
    preview = own_preview(config_of(chain, **{"preview.clips": 2}), cache)[0].preview
    assert (preview.clips, preview.prompts, preview.sizes) == (0, ("a black square moves right",), ((9, 16, 24),))
    others_held_out = config_of(chain, **{"preview.clips": 9, "split": "held-out"})
    assert set(own_preview(others_held_out, cache)[0].preview.prompts) == {caption for *_, caption, _ in CLIPS} - {
        "a black square moves right"
    }
    with pytest.raises(UserError, match="preview.clips and preview.prompts or preview.classes are both given"):
        config_of(chain, **{"preview.clips": 2, "preview.prompts": "('a',)", "preview.sizes": "((1,16,16),)"})
