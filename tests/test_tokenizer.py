"""Captions to ids: reserved ids, round trips, unknown text, the same everywhere."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.data.feeding.tokenizer import NULL, UNKNOWN, Tokenizer, TokenizerConfig, load, train
from sora_jax.errors import UserError

CAPTIONS = [
    f"a {size} {colour} {shape} moves {way}"
    for size in ("small", "large")
    for colour in ("red", "green", "blue")
    for shape in ("circle", "square")
    for way in ("left", "right")
] + ["红色的圆 moves 🚀"]


@pytest.fixture(scope="module")
def words():
    return train(CAPTIONS, TokenizerConfig(vocab=200, max_tokens=32))


@pytest.fixture(params=["words", "bytes"])
def either(request, words):
    return words if request.param == "words" else train([], TokenizerConfig(kind="bytes", max_tokens=32))


def decoded(tokenizer, ids):
    """Bytes as text; pieces of words, parted by spaces."""
    if tokenizer.config.kind == "words":
        return " ".join(tokenizer._pieces.id_to_token(i) for i in ids.tolist())
    return bytes((ids - 3).tolist()).decode()


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=100))
def test_bytes_round_trip(text):
    tokenizer = Tokenizer(TokenizerConfig(kind="bytes", max_tokens=400))
    assert decoded(tokenizer, tokenizer.encode(text)) == text


@settings(deadline=None)
@given(text=st.text(max_size=80))
def test_ids_are_in_range_and_never_padding(words, text):
    for tokenizer in (words, Tokenizer(TokenizerConfig(kind="bytes", max_tokens=32))):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and 1 <= len(ids) <= 32
        assert ids.min() > 0 and ids.max() < tokenizer.vocab_size
        assert (NULL not in ids) or ids.tolist() == [NULL]


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_an_empty_caption_is_the_null_caption(words, text):
    assert words.encode(text).tolist() == [NULL]
    assert Tokenizer(TokenizerConfig(kind="bytes")).encode("").tolist() == [NULL]


def test_known_captions_come_back_word_by_word(words):
    for caption in CAPTIONS[:-1]:
        assert decoded(words, words.encode(caption)) == caption


@pytest.mark.parametrize("text", ["红色的圆🚀", "lemon"])  # learnt; new, from known letters
def test_known_letters_of_any_script_are_spelt(words, text):
    ids = words.encode(text)
    assert UNKNOWN not in ids and decoded(words, ids).replace(" ", "") == text


def test_case_and_unicode_form_do_not_matter(words):
    plain = words.encode("a red circle")
    np.testing.assert_array_equal(words.encode("A RED Circle"), plain)
    np.testing.assert_array_equal(words.encode("ａ ｒｅｄ  circle"), plain)  # full-width letters


@pytest.mark.parametrize("text", ["<pad>", "<null>", "<unk>", "[PAD]", "a <pad> red"])
def test_a_caption_cannot_spell_a_reserved_id(words, text):
    assert not {0, NULL} & set(words.encode(text).tolist())


def test_long_captions_are_cut(either):
    long = either.encode("red circle " * 50)
    assert len(long) == 32
    np.testing.assert_array_equal(long, either.encode("red circle " * 90))
    assert either.read("red circle " * 50).tokens == 10 * either.read("red circle " * 5).tokens > 32
    assert either.read("red circle " * 50).is_cut and not either.read("red").is_cut
    assert either.read("red").tokens == len(either.encode("red"))


def test_a_cut_leaves_no_half_character():
    tokenizer = Tokenizer(TokenizerConfig(kind="bytes", max_tokens=4))
    assert decoded(tokenizer, tokenizer.encode("圆圆")) == "圆"


def test_vocabulary_keeps_to_its_limit():
    many = ["".join(chr(0x4E00 + (7 * i + j) % 500) for j in range(6)) for i in range(300)]
    for vocab in (16, 100):
        assert train(many, TokenizerConfig(vocab=vocab)).vocab_size <= vocab


def test_save_and_load(either, tmp_path):
    either.save(tmp_path / "tokenizer.json")
    again = load(tmp_path / "tokenizer.json")
    assert again.config == either.config and again.vocab_size == either.vocab_size
    for text in [*CAPTIONS, "", "unseen 圆 words"]:
        np.testing.assert_array_equal(again.encode(text), either.encode(text))
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_encode_all_is_encode_of_each(either):
    texts = [*CAPTIONS, "", *CAPTIONS[::-1]]
    for found, text in zip(either.encode_all(texts), texts, strict=True):
        np.testing.assert_array_equal(found.ids, either.encode(text))


@pytest.mark.parametrize(
    "text, unknown, spelt",
    [
        ("a red circle", [], True),
        ("a lemon", [], True),
        ("Ａ ＲＥＤ circle", [], True),  # full-width letters
        ("", [], True),
        ("a 🐙 circle", ["🐙"], True),
        ("蓝的圆 moves", ["蓝"], True),
        ("жёлтый circle", ["жёлтый"], True),
        ("жёлтый круг, жёлтый", ["жёлтый", "круг,"], False),
        ("caf\udce9 red", ["caf\udce9"], True),  # bytes of another encoding on the command line
    ],
)
def test_a_reading_names_the_words_that_are_not_known(words, text, unknown, spelt):
    found = words.read(text)
    assert list(found.unknown) == unknown and found.spelt == spelt
    (same,) = words.encode_all([text])
    assert same.tokens == found.tokens and same.unknown == (UNKNOWN in same.ids)
    assert same.unknown == bool(unknown)


@pytest.mark.parametrize("text", ["красный круг", "一只红色的圆", "🐙"])
def test_bytes_know_every_script(text):
    found = Tokenizer(TokenizerConfig(kind="bytes")).read(text)
    assert found.unknown == () and found.spelt


def test_training_is_the_same_in_every_process(words, tmp_path):
    code = (
        "import sys; from sora_jax.data.feeding.tokenizer import TokenizerConfig, train; "
        "train(sys.argv[2:], TokenizerConfig(vocab=200, max_tokens=32)).save(sys.argv[1])"
    )
    words.save(tmp_path / "here.json")
    for name in ("one.json", "two.json"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name), *CAPTIONS], check=True)
        assert (tmp_path / name).read_bytes() == (tmp_path / "here.json").read_bytes()


@pytest.mark.parametrize(
    "make,word",
    [
        (lambda path: TokenizerConfig(kind="t5"), "t5"),
        (lambda path: TokenizerConfig(vocab=3), "tokenizer.vocab"),
        (lambda path: TokenizerConfig(max_tokens=0), "tokenizer.max_tokens"),
        (lambda path: train(["", " "], TokenizerConfig()), "no caption"),
        (lambda path: load(path / "none.json"), "does not exist"),
        (lambda path: load(__file__), "not a tokenizer"),
    ],
)
def test_mistakes(make, word, tmp_path):
    with pytest.raises(UserError, match=word):
        make(tmp_path)
