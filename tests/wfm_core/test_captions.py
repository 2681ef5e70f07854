"""Captions, from an endpoint that is played by a server of the standard library."""

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import cv2
import numpy as np
import pytest

from wfm_core.curation import captions
from wfm_core.curation.captions import CaptionSettings, RefusedError, caption

SAID = " A block\nmoves. "


@pytest.fixture
def endpoint():
    """Its address, what it was asked, and what it is to answer: a status and a body."""
    asked, answer = (
        [],
        {"status": 200, "busy": [], "body": {"choices": [{"message": {"content": SAID}}]}},
    )

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            content = json.dumps(answer["body"]).encode()
            self.send_response(answer["busy"].pop() if answer["busy"] else answer["status"])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked, answer
    server.shutdown()
    server.server_close()


FRAMES = np.repeat((20 * np.arange(10, dtype=np.uint8))[:, None, None, None], 3, axis=-1) * np.ones(
    (40, 600, 1), np.uint8
)


def test_the_model_is_shown_frames_and_its_answer_is_the_caption(endpoint, monkeypatch):
    url, asked, _ = endpoint
    monkeypatch.setenv("MY_KEY", "secret")
    settings = CaptionSettings(url, "some-model", "What is this?", num_frames=3, key_variable="MY_KEY")
    assert caption(FRAMES, settings) == "A block moves."
    ((path, authorization, body),) = asked
    assert (path, authorization, body["model"]) == ("/v1/chat/completions", "Bearer secret", "some-model")
    text, *pictures = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is this?"}
    shown = []
    for picture in pictures:
        content = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
        shown.append(cv2.imdecode(np.frombuffer(content, np.uint8), 1))
    assert [each.shape for each in shown] == [(34, 512, 3)] * 3
    assert [each.mean() for each in shown] == pytest.approx([0, 80, 180], abs=2)


def test_who_is_busy_is_asked_again(endpoint, monkeypatch):
    waited = []
    monkeypatch.setattr(captions.time, "sleep", waited.append)
    url, asked, answer = endpoint
    answer["busy"] = [503, 429]
    assert caption(FRAMES, CaptionSettings(url, "some-model")) == "A block moves."
    assert len(asked) == 3 and waited == [2, 8]
    answer["busy"] = [429] * 3
    with pytest.raises(ConnectionError, match="429"):
        caption(FRAMES, CaptionSettings(url, "some-model", retries=2))
    assert len(asked) == 6


def test_a_refusal_is_for_good(endpoint):
    url, asked, answer = endpoint
    answer |= {"status": 400, "body": {"error": "indecent"}}
    with pytest.raises(RefusedError, match="400: .*indecent"):
        caption(FRAMES, CaptionSettings(url, "some-model"))
    answer |= {"status": 200, "body": {"choices": [{"message": {"content": " "}}]}}
    with pytest.raises(RefusedError, match="must be text, got ' '"):
        caption(FRAMES, CaptionSettings(url, "some-model"))
    assert len(asked) == 2


def test_no_answer_is_an_error_that_says_why(endpoint, monkeypatch):
    url, asked, answer = endpoint
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    settings = CaptionSettings(url, "some-model", retries=0)
    for status, body, message in (
        (500, {}, "no caption from http://127.0.0.1:.*500"),
        (404, {}, "no caption from http://127.0.0.1:.*404.*; check the url, the model's name and the key"),
        (200, {"error": "busy"}, 'must answer by a chat completion, got 200: {"error": "busy"}'),
    ):
        answer |= {"status": status, "body": body}
        with pytest.raises(ConnectionError, match=message):
            caption(FRAMES, settings)
    assert asked[0][1] is None
    with pytest.raises(ConnectionError, match="no caption from http://127.0.0.1:1/v1: ConnectError"):
        caption(FRAMES, CaptionSettings("http://127.0.0.1:1/v1", "some-model", retries=0))
    with pytest.raises(ValueError, match=r"captions.model must name a model"):
        CaptionSettings(url)
    with pytest.raises(ValueError, match=r"captions.retries must be at least 0, got -1"):
        CaptionSettings(retries=-1)
    with pytest.raises(ValueError, match=r"captions.num_frames must be at least 1, got 0"):
        CaptionSettings(num_frames=0)
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ImportError, match=r"captions need httpx: pip install 'worldsim\[curate\]'"):
        caption(FRAMES, settings)
