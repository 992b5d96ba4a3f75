"""Prompts are expanded: by the rules of the world, and by a language model behind a server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from fixtures_runs import chain, run  # noqa: F401

from sora_jax.errors import UserError
from sora_jax.generate.expand import INSTRUCTION, describe_world, expand_prompts
from sora_jax.generate.recipe import read_recipe
from sora_jax.worlds.captions import parse


@pytest.mark.parametrize(
    "prompt", ["a red circle moves left", "a square", "a circle stays still", "a blue ring and a star"]
)
def test_the_world_says_all_and_keeps_what_was_said(prompt):
    said, found = parse(prompt), parse(describe_world(prompt, 0))
    assert found.style and found.tone and len(found.shapes) == len(said.shapes)
    for shape, full in zip(said.shapes, found.shapes, strict=True):
        assert full.kind == shape.kind and full.colour and full.motion
        assert shape.colour in (None, full.colour) and shape.motion in (None, full.motion)
        assert shape.direction in (None, full.direction)


def test_choices_are_of_seed_and_prompt_and_differ():
    texts = [describe_world("a circle", seed) for seed in range(20)]
    assert texts == [describe_world("a circle", seed) for seed in range(20)]
    assert len(set(texts)) > 10
    assert describe_world("a fox runs", 3) == "a fox runs"
    full = "a red circle moves left on a plain sand background"
    assert describe_world(full, 0) == full


@pytest.fixture
def server():
    """A server with OpenAI's interface that shouts."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            text = body["messages"][-1]["content"].upper()
            answer = {"choices": [{"message": {"content": f" {text}!\n"}}]} if body["model"] != "bad" else {}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}/v1", asked
    made.shutdown()
    thread.join()
    made.server_close()


def test_an_endpoint_is_asked_once_for_each_prompt(server):
    address, asked = server
    assert expand_prompts(["a fox", "a hen"], f"{address}#small", 7) == ["A FOX!", "A HEN!"]
    assert [path for path, _ in asked] == ["/v1/chat/completions"] * 2
    assert asked[0][1]["model"] == "small" and asked[0][1]["seed"] == 7
    assert asked[0][1]["messages"][0] == {"role": "system", "content": INSTRUCTION}
    with pytest.raises(UserError, match="it does not answer"):
        expand_prompts(["a"], f"{address}#bad")


@pytest.mark.parametrize(
    "how, message",
    [
        ("magic", "--expand is 'magic'; it must be world, http"),
        ("http://127.0.0.1:9/v1", "it does not answer"),
        ("transformers:nothing/here", "it needs pip install|cannot be loaded"),
    ],
)
def test_what_cannot_expand_says_so(how, message):
    with pytest.raises(UserError, match=message):
        expand_prompts(["a fox"], how)


def test_the_command_prints_and_keeps_what_was_expanded(chain, tmp_path, capfd):  # noqa: F811
    out, again = tmp_path / "a.png", tmp_path / "b.png"
    common = [f"--workdir={chain.transformer}", "--steps=2", "--size=16"]
    assert run("sample", *common, "--prompt=a circle", "--expand=world", f"--out={out}") == 0
    caption = describe_world("a circle", 0)
    assert f"'a circle' is expanded to {caption!r}" in capfd.readouterr().err
    assert read_recipe(out)["prompt"] == caption
    assert run("sample", f"--like={out}", f"--out={again}") == 0
    assert "expanded" not in capfd.readouterr().err
    assert again.read_bytes() == out.read_bytes()
