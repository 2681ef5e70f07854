"""Videos with known answers: textures that move, scenes that are cut, captions that stay."""

import cv2
import numpy as np

from wfm_core.data.video import VideoEncoding, encode_video

PLAIN = VideoEncoding("libx264", "yuv420p", (("crf", "12"), ("preset", "ultrafast")))


def texture(seed: int, height: int = 400, width: int = 500) -> np.ndarray:
    """A picture (height, width, 3) uint8 of soft blobs in some colour."""
    rng = np.random.default_rng(seed)
    blobs = cv2.GaussianBlur(rng.standard_normal((height, width, 3)).astype(np.float32), (0, 0), 5)
    blobs = blobs / blobs.std() * 40 + rng.integers(70, 180, 3)
    return np.clip(blobs, 0, 255).astype(np.uint8)


def view(
    picture: np.ndarray, x: float = 0.0, y: float = 0.0, scale: float = 1.0, turn: float = 0.0, size=(120, 160)
) -> np.ndarray:
    """What is seen of a picture by a camera that has gone x to the right and y up, has zoomed in and is turned
    clockwise, by radians.
    """
    (height, width), (h, w) = picture.shape[:2], size
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), np.degrees(turn), scale)
    matrix[:, 2] += (w / 2 - width / 2 - x, h / 2 - height / 2 + y)
    return cv2.warpAffine(picture, matrix, (w, h), borderMode=cv2.BORDER_REFLECT)


def shot(seed: int, num_frames: int, size=(120, 160), step: float = 1.0) -> np.ndarray:
    """A block that moves before a background of its own, (num_frames, *size, 3) uint8."""
    background = view(texture(seed), size=size)
    frames = np.repeat(background[None], num_frames, axis=0)
    for t, frame in enumerate(frames):
        x = int(5 + step * 2 * t) % (size[1] - 30)
        frame[20:100, x : x + 40] = np.roll((230, 40, 60), seed)
    return frames


def write_video(path, frames: np.ndarray, fps: int = 10, encoding: VideoEncoding = PLAIN):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_video(frames, fps, encoding))
    return path
