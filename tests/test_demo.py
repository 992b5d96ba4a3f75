"""The page's studio makes what the command line makes, within limits, and says what is wrong in one sentence."""

import contextlib
import re
import shlex
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fixtures_demo import studio, uploads  # noqa: F401
from fixtures_media import encode, noise
from fixtures_runs import chain, run, trained  # noqa: F401

from sora_jax import cli
from sora_jax.data.reading.media import decode
from sora_jax.data.viewing.write import read_comment, save_png, write_video
from sora_jax.demo import html
from sora_jax.demo.fields import AREAS, BEFORE, OWN, WIDER, WORDS, Clip, Limits, area_mask
from sora_jax.demo.serve import Address, check_address, check_gradio
from sora_jax.demo.studio import Cancelled, Studio, preview_of
from sora_jax.errors import UserError, install_command

PROMPT = "a red square moves right"
FIELDS = {"prompt": PROMPT, "negative": "", "size": "16 x 24", "frames": 9, "seed": 3, "steps": 2, "guidance": 2.0}
TASKS = {  # name -> task, fields of its tab
    "text": ("text", {}),
    "picture": ("text", {"frames": 1}),
    "image": ("image", {"image": "clip"}),
    "extend": ("extend", {"video": "clip", "extend": 4, "side": ""}),
    "before": ("extend", {"video": "clip", "extend": 4, "side": BEFORE}),
    "loop": ("loop", {"video": None, "gap": 8}),
    "close": ("loop", {"video": "clip", "gap": 4}),
    "connect": ("connect", {"first": "clip", "second": "other", "gap": 4}),
    "fill": ("fill", {"video": "clip", "mask": None, "area": next(iter(AREAS))}),
    "own mask": ("fill", {"video": "clip", "mask": "mask", "area": OWN}),
    "wider": ("fill", {"video": "clip", "mask": None, "area": WIDER}),
    "edit": ("edit", {"video": "clip", "strength": 0.7, "from-prompt": ""}),
    "change": ("edit", {"video": "clip", "strength": 0.7, "from-prompt": "a blue square moves right"}),
    "long": ("long", {"long": 21, "then": "", "at": 8}),
    "turns": ("long", {"long": 21, "then": "a green square", "at": 8}),
}


def values_of(name: str, uploads: dict) -> tuple[str, dict]:  # noqa: F811
    """Return the task of a name in `TASKS` and its fields, with clips for their names."""
    task, fields = TASKS[name]
    clips = {key: uploads[value] for key, value in fields.items() if isinstance(value, str) and value in uploads}
    return task, {**FIELDS, **fields, **clips}


def frames_of(clip: Clip, folder: Path) -> np.ndarray:
    file = folder / f"read-{clip.name}"
    file.write_bytes(clip.data)
    return decode(file).frames


def test_every_tab_is_tried():
    assert {task for task, _ in TASKS.values()} == set(WORDS)


@pytest.mark.parametrize("name", TASKS)
def test_the_command_that_is_shown_makes_the_clip_again(name, studio, uploads, chain, tmp_path, monkeypatch):  # noqa: F811
    task, values = values_of(name, uploads)
    clip = studio.make(task, values)
    (tmp_path / "transformer").symlink_to(chain.transformer)
    monkeypatch.chdir(tmp_path)
    for other in uploads.values():
        Path(other.name).write_bytes(other.data)
    if values.get("area") in AREAS:
        save_png(f"{values['area'].replace(' ', '-')}.png", area_mask(values["area"], 48, 72)[0])
    words = shlex.split(clip.command)
    assert words[:2] == ["sora-jax", "sample"]
    assert run(*words[1:]) == 0
    again = decode(clip.name).frames
    shown = frames_of(clip, tmp_path)
    assert shown.shape == again.shape and np.abs(shown.astype(int) - again).mean() < 0.5  # x264 may code otherwise
    scale = shown.shape[1] // clip.size[1]
    assert scale > 1 and shown.shape[:3] == (clip.size[0], scale * clip.size[1], scale * clip.size[2])
    assert len(np.unique(shown[:, ::scale, ::scale])) > 1


def test_sizes_of_results_follow_from_the_fields(studio, uploads):  # noqa: F811
    def size(name):
        task, values = values_of(name, uploads)
        return studio.make(task, values).size

    assert size("text") == (9, 16, 24) and size("picture") == (1, 16, 24)
    assert size("extend") == size("before") == (13, 16, 24)
    assert size("connect") == (9 + 4 + 5, 16, 24)
    assert size("loop") == (8, 16, 24) and size("close") == (8 + 4, 16, 24)
    height, width = size("wider")[1:]
    assert height == 16 and width > 24
    assert size("turns") == (21, 16, 24)


def test_no_folder_of_the_server_is_told(studio, uploads, chain, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "server"))
    (tmp_path / "server").mkdir()
    task, values = values_of("connect", uploads)
    clip = studio.make(task, values)
    (tmp_path / clip.name).write_bytes(clip.data)
    recipe = read_comment(tmp_path / clip.name)
    assert "clip.mp4" in recipe and "--gap=4" in recipe
    broken = Clip("clip.mp4", b"no video", (9, 16, 24))
    with pytest.raises(UserError, match=r"^Clip is 'clip.mp4'; it cannot be read: ") as refused:
        studio.make("extend", {**FIELDS, "video": broken, "extend": 4})
    for text in (recipe, clip.command, "".join(clip.notes), str(refused.value)):
        assert str(tmp_path) not in text and str(chain.folder) not in text and "/tmp" not in text
    assert not list((tmp_path / "server").iterdir())  # nothing is left of clips that were made, or refused


def test_notes_say_what_was_not_learnt_and_what_changed(studio, uploads):  # noqa: F811
    new_word = studio.make("text", {**FIELDS, "prompt": "a red square flies"}).notes
    assert any("'flies'" in note for note in new_word)
    assert studio.make("text", FIELDS).notes == ()
    task, values = values_of("image", uploads)
    assert studio.make(task, values).notes == ("Image is scaled and cropped from 48x72 to 16x24 (height x width)",)
    own = studio.make("image", {**FIELDS, "image": studio.make("text", FIELDS)})
    assert own.notes == ()  # a clip of the page is only enlarged to be seen


WRONG = {
    "no prompt": ("text", {"prompt": "  "}, r"^Prompt is empty; say what the clip shows$"),
    "long prompt": ("text", {"prompt": "red " * 200}, r"^Prompt has 800 letters; it must have at most 500$"),
    "script": ("text", {"prompt": "красный"}, r"^Prompt is 'красный'; the tokenizer of this run knows none"),
    "size, words": ("text", {"size": "large"}, r"^Size is 'large'; it must be height x width, such as 24 x 36$"),
    "size, none": ("text", {"size": None}, r"^Size is ''; it must be height x width"),
    "size, nothing": ("text", {"size": "0 x 0"}, r"^Size is '0 x 0'; both must be at least 1, such as 24 x 36$"),
    "height": ("text", {"size": "17 x 24"}, r"^Height is 17; it must be a multiple of 8, such as 16 or 24$"),
    "frames": ("text", {"frames": 8}, r"^Frames is 8; .*7 or 9|^Frames is 8; .*5 or 9"),
    "frames, zero": ("text", {"frames": 0}, r"^Frames is 0; "),
    "too large": ("text", {"size": "1024 x 1024"}, r"^Frames is 9; it must be of a smaller size$"),
    "too many": ("long", {"long": 100_001}, r"^Frames is 100,001; it must be at most 2,604 with a size of 16 x 24$"),
    "steps": ("text", {"steps": 0}, r"^Steps is 0; it must be from 1 to 100$"),
    "too many steps": ("text", {"steps": 1000}, r"^Steps is 1000; it must be from 1 to 100$"),
    "steps, broken": ("text", {"steps": 2.5}, r"^Steps is 2.5; it must be a whole number$"),
    "seed": ("text", {"seed": -1}, r"^Seed is -1; it must be a whole number from 0 to 4294967295$"),
    "no seed": ("text", {"seed": None}, r"^Seed is empty; it must be a whole number$"),
    "guidance": ("text", {"guidance": float("inf")}, r"^Guidance is inf; it must be a finite number$"),
    "negative": ("text", {"negative": "blue", "guidance": 1.0}, r"^Negative prompt is 'blue'; it needs a guidance"),
    "no clip": ("extend", {"extend": 4}, r"^Clip is missing; choose one, by the buttons$"),
    "no image": ("image", {}, r"^Image is missing; choose one, by the buttons$"),
    "one clip": ("connect", {"first": "clip", "gap": 4}, r"^Second clip is missing; choose one, by the buttons$"),
    "no mask": ("fill", {"video": "clip", "area": OWN}, r"^Mask is missing; choose one, by the buttons$"),
    "black mask": ("fill", {"video": "clip", "area": OWN, "mask": "black"}, r"^Nothing is to be made: Mask has"),
    "one frame": ("image", {"image": "clip", "frames": 1}, r"^Image is the only frame; .*Frames must be at least 2"),
    "extend": ("extend", {"video": "clip", "extend": 0}, r"^Frames to add is 0; it must be at least 1$"),
    "gap": ("connect", {"first": "clip", "second": "clip", "gap": 3}, r"^Frames between is 3; it must be a mult"),
    "strength": ("edit", {"video": "clip", "strength": 2.0}, r"^Strength is 2.0; it must be from 0 to 1$"),
    "late turn": ("long", {"long": 9, "then": "a green square", "at": 50}, r"^Prompt changes at frame 50; the clip"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_sentence_in_the_words_of_the_page(name, studio, uploads, tmp_path):  # noqa: F811
    task, fields, sentence = WRONG[name]
    black = save_png(tmp_path / "black.png", np.zeros((16, 24, 3), np.uint8))
    clips = uploads | {"black": studio.pick("black.png", black.read_bytes())}
    fields = {key: clips.get(value, value) if isinstance(value, str) else value for key, value in fields.items()}
    with pytest.raises(UserError, match=sentence) as refused:
        studio.make(task, {**FIELDS, **fields})
    assert "--" not in str(refused.value) and "\n" not in str(refused.value)


def test_uploads_of_any_kind_are_taken_and_others_refused(studio, tmp_path):  # noqa: F811
    def pick(name: str, file: Path) -> Clip:
        return studio.pick(name, file.read_bytes())

    encode(tmp_path / "tall.mov", noise(6, 96, 64))
    assert pick("../../etc/My film (1).mov", tmp_path / "tall.mov").name == "My-film-1.mov"
    found = pick("tall.mov", tmp_path / "tall.mov")
    assert found.size[0] == 6 and found.size[1] > found.size[2] and found.size[1] * found.size[2] <= 16 * 24
    picture = decode(_written(tmp_path / "preview.gif", preview_of(found))).frames
    assert picture.shape[:3] == found.size
    save_png(tmp_path / "a.png", noise(1)[0])
    assert pick("a.png", tmp_path / "a.png").size[0] == 1
    write_video(tmp_path / "long.gif", noise(12, 8, 8), 8)
    small = Studio(studio.run, "x", studio.folder, cli.parsed, Limits(frames=11, megabytes=1))
    with pytest.raises(UserError, match=r"^Clip has more than 11 frames; cut it before$"):
        small.pick("long.gif", (tmp_path / "long.gif").read_bytes())
    with pytest.raises(UserError, match=r"^Clip is a file of 1.5 MB; it must be at most 1 MB$"):
        small.pick("a.mp4", bytes(3 * 2**19))
    with pytest.raises(UserError, match=r"^Mask is 'notes.txt'; it cannot be read: [^/]*$"):
        small.pick("notes.txt", b"a text", "mask")


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_clip_that_is_cancelled_or_takes_too_long_ends_and_the_next_is_made(studio):  # noqa: F811
    def cancel(done: int, total: int) -> None:
        assert 0 <= done <= total
        studio.cancel("one")
        studio.cancel("another visitor")

    first = studio.make("text", FIELDS, "one")
    with pytest.raises(Cancelled):
        studio.make("text", {**FIELDS, "steps": 4}, "one", cancel)
    assert studio.make("text", FIELDS, "one").size == first.size
    assert not studio._jobs  # of visitors who have gone, and of those who cancelled when nothing was made
    slow = Studio(studio.run, "x", studio.folder, cli.parsed, Limits(seconds=1e-9))
    with pytest.raises(UserError, match=r"^The clip takes longer than 1e-09 s; take fewer frames or steps$"):
        slow.make("text", FIELDS)


def test_a_cancelled_clip_ends_though_the_visitor_has_begun_another(studio):  # noqa: F811
    jobs, sizes = [], []
    other = threading.Thread(target=lambda: sizes.append(studio.make("text", FIELDS, "one").size))

    def again(done: int, total: int) -> None:
        if not jobs:
            jobs.append(studio._jobs["one"])
            studio.cancel("one")
            other.start()
            end = time.monotonic() + 20
            while studio._jobs["one"] is jobs[0] and time.monotonic() < end:
                time.sleep(0.01)

    with pytest.raises(Cancelled):
        studio.make("text", {**FIELDS, "steps": 4}, "one", again)
    other.join()
    assert sizes == [(9, 16, 24)] and not studio._jobs


def test_uploads_beside_a_clip_leave_stderr_and_its_notes_alone(studio, uploads):  # noqa: F811
    before, clip = sys.stderr, uploads["clip"]

    def pick() -> None:
        for _ in range(4):
            studio.pick("other.mp4", clip.data, "first")

    threads = [threading.Thread(target=pick) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert studio.make("text", {**FIELDS}, "one", lambda done, total: [thread.join() for thread in threads]).notes == ()
    assert sys.stderr is before


def test_programs_of_too_many_shapes_are_dropped(studio, monkeypatch):  # noqa: F811
    dropped = []
    monkeypatch.setattr("sora_jax.demo.studio.PROGRAMS", 2)
    monkeypatch.setattr("jax.clear_caches", lambda: dropped.append(1))
    own = Studio(studio.run, "x", studio.folder, cli.parsed)
    found = []
    for changed in ({}, {"seed": 4}, {"frames": 1}, {"prompt": "a green square"}, {"frames": 5}, {"frames": 5}):
        own._bound_programs("text", {**FIELDS, **changed})
        found.append(len(dropped))
    assert found == [0, 0, 0, 0, 1, 1]


def test_one_clip_is_made_at_a_time(studio):  # noqa: F811
    inside, most = [], []

    def watch(done: int, total: int) -> None:
        inside.append(threading.get_ident())
        most.append(len(set(inside)))
        if done == total:
            inside[:] = [one for one in inside if one != threading.get_ident()]

    threads = [threading.Thread(target=studio.make, args=("text", FIELDS, str(i), watch)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) >= 6 and max(most) == 1


def test_examples_are_the_prompts_of_the_previews(studio):  # noqa: F811
    own = Studio(studio.run, "x", studio.folder, cli.parsed)
    own.prepare()
    assert own.ready.is_set()
    assert [(clip.prompt, clip.size) for clip in own.examples] == own.prompts
    small = Studio(studio.run, "x", studio.folder, cli.parsed, Limits(pixels=16 * 24 * 8))
    small.prepare()  # the first preview is too large
    assert small.ready.is_set() and small.examples == []
    assert own.prompts == [("a red square moves right", (9, 16, 24)), ("a green square", (1, 16, 16))]


def test_what_visitors_write_is_text_on_the_page():
    clip = Clip("x.mp4", b"", (9, 16, 24), "<script>alert(1)</script>")
    for part in (
        html.result(clip),
        html.cards([clip], [clip.prompt]),
        html.error(clip.prompt),
        html.notes([clip.prompt]),
    ):
        assert "<script" not in part and "&lt;script" in part


def test_wrong_limits_and_ports_are_refused(chain, capsys):  # noqa: F811
    with pytest.raises(UserError, match=r"^--max-steps is 0; it must be positive$"):
        Limits(steps=0)
    with pytest.raises(UserError, match=r"^--queue is 0; it must be positive$"):
        Limits(queue=0)
    for option, sentence in (("--port=0", "--port is 0; it must be from 1 to 65535"),
                             ("--max-megabytes=0", "--max-megabytes is 0; it must be positive")):  # fmt: skip
        assert run("demo", f"--workdir={chain.transformer}", option) == 2
        assert capsys.readouterr().err == f"sora-jax: {sentence}\n"


def test_a_port_that_is_taken_and_a_missing_gradio_are_one_sentence(monkeypatch):
    import socket

    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^--port is {port}; another program has it on 127.0.0.1: it must"):
            check_address(Address(port=port))
    check_address(Address(port=port))
    with pytest.raises(UserError, match=r"^--host is 'nowhere.invalid'; it must be an address of this machine"):
        check_address(Address("nowhere.invalid"))
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=f"^gradio is not installed; .*: {re.escape(install_command('demo'))}$"):
        check_gradio()
