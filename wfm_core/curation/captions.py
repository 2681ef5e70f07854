"""Captions by a vision-language model of the user's, over an OpenAI-compatible endpoint."""

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from wfm_core.data.video import resize_frames

SIDE = 512
"""Pixels of a picture's longer side, at most."""


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
        retries: how often to try again where no connection is made.
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
        if self.num_frames < 1:
            raise ValueError(f"captions.num_frames must be at least 1, got {self.num_frames}")


def caption(frames: np.ndarray, settings: CaptionSettings) -> str:
    """Ask for a caption of a clip.

    Args:
        frames: (T, H, W, 3) uint8.
        settings: whom and what to ask.

    Raises:
        ConnectionError: there is no answer, or one that makes no sense; says which.
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
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=settings.retries), timeout=settings.timeout) as client:
            answer = client.post(
                f"{settings.url.rstrip('/')}/chat/completions",
                json=question,
                headers={"Authorization": f"Bearer {key}"} if key else {},
            )
            answer.raise_for_status()
            text = answer.json()["choices"][0]["message"]["content"]
    except httpx.HTTPError as error:
        raise ConnectionError(f"no caption from {settings.url}: {type(error).__name__}: {error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ConnectionError(f"{settings.url} must answer by a chat completion, got {answer.text:.200}") from error
    if not isinstance(text, str) or not text.strip():
        raise ConnectionError(f"the caption of {settings.url} must be text, got {text!r:.200}")
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
