"""Captions by a vision-language model of the user's, over an OpenAI-compatible endpoint."""

import base64
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from wfm_core.data.video import resize_frames

if TYPE_CHECKING:  # an extra
    import httpx

SIDE = 512
"""Pixels of a picture's longer side, at most."""
MISUNDERSTOOD = (401, 403, 404)
"""Answers that refuse whoever asks, or where, and not what is asked: until that is mended no clip gets a caption."""
BUSY = (408, 425, 429)
"""Answers that, like all from 500 on, may be others a little later."""
PAUSE = 2.0
"""Seconds before the first retry, and four times as many before each further one."""


class RefusedError(ValueError):
    """The model says nothing of a clip, and would not if it were asked again."""


@dataclass
class CaptionSettings:
    """Whom to ask, and what.

    Attributes:
        url: of the endpoint, up to and with /v1; "" asks nobody.
        model: its name there.
        prompt: what it is asked about the frames.
        num_frames: of a clip that it is shown, evenly spread.
        max_tokens: of its answer.
        key_variable: environment variable that holds the key, if one is needed.
        timeout: seconds to wait for an answer.
        retries: how often to try again where there is no answer, or whoever should give it is busy or broken.
    """

    url: str = ""
    model: str = ""
    prompt: str = (
        "These are frames of one video clip, in order. Describe in one or two plain sentences what is to be seen, "
        "what moves and how, and what the camera does."
    )
    num_frames: int = 4
    max_tokens: int = 200
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 3

    def __post_init__(self) -> None:
        if self.url and not self.model:
            raise ValueError("captions.model must name a model of the endpoint, got none")
        if self.retries < 0:
            raise ValueError(f"captions.retries must be at least 0, got {self.retries}")
        if self.num_frames < 1:
            raise ValueError(f"captions.num_frames must be at least 1, got {self.num_frames}")


def caption(frames: np.ndarray, settings: CaptionSettings) -> str:
    """Ask for a caption of a clip.

    Args:
        frames: (T, H, W, 3) uint8.
        settings: whom and what to ask.

    Raises:
        ConnectionError: there is no answer, or one that makes no sense; says which.
        RefusedError: the answer is that there is none for this clip.
        ImportError: the client is not installed.
    """
    try:
        import httpx
    except ImportError as error:
        raise ImportError("captions need httpx: pip install 'worldsim[curate]'") from error
    key = os.environ.get(settings.key_variable, "")
    chosen = np.linspace(0, len(frames) - 1, min(settings.num_frames, len(frames))).round().astype(int)
    question = {
        "model": settings.model,
        "max_tokens": settings.max_tokens,
        "temperature": 0,
        "messages": [{"role": "user", "content": [{"type": "text", "text": settings.prompt}, *_shown(frames[chosen])]}],
    }
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(timeout=settings.timeout, headers=headers) as client:
        for attempt in range(settings.retries + 1):
            if attempt:
                time.sleep(PAUSE * 4 ** (attempt - 1))
            try:
                answer = client.post(f"{settings.url.rstrip('/')}/chat/completions", json=question)
            except httpx.HTTPError as error:
                said, cause = f"{type(error).__name__}: {error}", error
            else:
                said, cause = f"{answer.status_code}: {answer.text:.200}", None
                if answer.status_code not in BUSY and answer.status_code < 500:
                    return _caption_of(answer, settings.url, said)
    raise ConnectionError(f"no caption from {settings.url}: {said}") from cause


def _caption_of(answer: "httpx.Response", url: str, said: str) -> str:
    if answer.status_code in MISUNDERSTOOD:
        raise ConnectionError(f"no caption from {url}: {said}; check the url, the model's name and the key")
    if answer.status_code >= 400:
        raise RefusedError(f"no caption from {url}: {said}")
    try:
        text = answer.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise ConnectionError(f"{url} must answer by a chat completion, got {said}") from error
    if not isinstance(text, str) or not text.strip():
        raise RefusedError(f"the caption of {url} must be text, got {text!r:.200}")
    return " ".join(text.split())


def _shown(frames: np.ndarray) -> Sequence[dict]:
    height, width = frames.shape[1:3]
    scale = min(1.0, SIDE / max(height, width))
    parts = []
    for frame in resize_frames(frames, max(1, round(scale * height)), max(1, round(scale * width))):
        done, jpeg = cv2.imencode(".jpg", frame[..., ::-1])
        assert done
        url = "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts
