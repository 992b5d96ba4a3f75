"""Text of a pretrained encoder: a small T5 with random weights, from words to a trained run and a sample."""

import json

import numpy as np
import pytest
from fixtures_runs import chain, one_device, run, train_options  # noqa: F401

from sora_jax.data.feeding.tokenizer import NULL, UNKNOWN
from sora_jax.data.storing.latents import LatentCache
from sora_jax.errors import UserError
from sora_jax.models.pretrained import PretrainedText

WORDS = "a the red blue green grey white black square circle moves right left up down waits".split()


def make_t5(folder, seed=0) -> str:
    """A T5 encoder of two layers, with a tokenizer of whole words that ends each text as T5 does."""
    torch = pytest.importorskip("torch", reason="needs sora_jax[text]")
    transformers = pytest.importorskip("transformers", reason="needs sora_jax[text]")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    pieces = Tokenizer(models.WordLevel(words, "<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=len(words), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, pad_token_id=0, eos_token_id=1
    )
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return PretrainedText(make_t5(tmp_path_factory.mktemp("t5")), 6)


def test_batches_of_captions_are_captions_alone(encoder):
    texts = ["a red square moves right", "", "a circle", "a red square moves right", "the green square waits up up up"]
    together = encoder.embed_all(texts)
    assert [len(found) for found in together] == [6, 1, 3, 6, 6]  # with the end of the text, cut to 6
    for text, found in zip(texts, together, strict=True):
        assert found.dtype == np.float16 and found.shape[1] == encoder.width == 24
        np.testing.assert_allclose(found, encoder.embed(text), atol=2e-3)
    assert not np.allclose(together[0][:3], together[4][:3], atol=0.05)
    assert encoder.read(texts[4]).tokens == 8 and encoder.read(texts[4]).is_cut
    assert encoder.read("a красный circle").unknown == ("красный",) and encoder.read("a красный circle").spelt
    assert not encoder.read("красный круг").spelt and encoder.read("a circle").unknown == ()
    np.testing.assert_array_equal(encoder.encode("a circle"), [UNKNOWN] * 3)
    np.testing.assert_array_equal(encoder.encode(" "), [NULL])


def test_the_fingerprint_is_of_the_weights(encoder, tmp_path):
    assert PretrainedText(make_t5(tmp_path / "same"), 6).info.fingerprint == encoder.info.fingerprint
    assert PretrainedText(make_t5(tmp_path / "other", seed=1), 6).info.fingerprint != encoder.info.fingerprint


def test_a_run_learns_from_cached_embeddings_and_samples(encoder, chain, tmp_path, capsys):  # noqa: F811
    latents, workdir = tmp_path / "latents", tmp_path / "run"
    folders = [f"--autoencoder={chain.autoencoder}", f"--data={chain.dataset}", f"--out={latents}"]
    assert run("data", "encode", *folders, f"--text-encoder={encoder.name}", "--text-tokens=6") == 0
    cache = LatentCache(latents)
    for clip in range(len(cache)):
        caption = cache.column("captions")[clip].as_py()[0]
        np.testing.assert_allclose(cache.text(clip, 0), encoder.embed(caption), atol=2e-3)
    learnt = [f"latents={latents}", "loop.steps=2", "tokenizer.max_tokens=6", "preview.prompts=()"]
    assert run(*train_options("transformer", workdir, *learnt)) == 2  # the cache has text, the config wants none
    assert "text.pretrained is ''" in capsys.readouterr().err
    learnt += [f"model.text.pretrained={encoder.name}", "model.text.pretrained_width=24"]
    assert run(*train_options("transformer", workdir, *learnt)) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(lines[-1]["loss"])
    sizes = ["--frames=1", "--height=16", "--width=16", "--steps=2"]
    out = tmp_path / "sample.png"
    assert run("sample", f"--workdir={workdir}", "--prompt=a red square moves right", *sizes, f"--out={out}") == 0
    assert out.exists()
    assert run("data", "encode", *folders) == 2  # another cache than the one that is there
    assert "--text-encoder is ''" in capsys.readouterr().err


def test_a_name_that_cannot_be_loaded_is_one_sentence(tmp_path):
    pytest.importorskip("transformers", reason="needs sora_jax[text]")
    with pytest.raises(UserError, match="--text-encoder is .*cannot be loaded"):
        PretrainedText(str(tmp_path), 6).embed("a")


def test_without_the_library_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    monkeypatch.setitem(__import__("sys").modules, "torch", __import__("types").ModuleType("torch"))
    with pytest.raises(UserError, match=r"needs transformers: pip install -e '.*\[text\]'"):
        PretrainedText("t5", 6).embed("a")
