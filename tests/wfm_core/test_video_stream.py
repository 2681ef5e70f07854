"""Streams of frames: what was encoded comes out, upright, in constant memory, and poison is refused."""

import re

import numpy as np
import pytest
from moving_pictures import shot, write_video

from wfm_core.data import video_stream
from wfm_core.data.files import DataError
from wfm_core.data.video import ENCODINGS
from wfm_core.data.video_stream import picture_at, stream_video


def test_frames_come_out_as_they_went_in(tmp_path):
    frames = shot(0, 12)
    path = write_video(tmp_path / "v.mp4", frames, 8, ENCODINGS["lossless"])
    moments = list(stream_video(path))
    assert [moment.index for moment in moments] == list(range(12)) and moments[0].fps == 8
    assert [moment.second for moment in moments] == pytest.approx(np.arange(12) / 8)
    np.testing.assert_array_equal(np.stack([moment.picture(120, 160) for moment in moments]), frames)
    np.testing.assert_array_equal(picture_at(path, 0.74, 120, 160), frames[6])
    small = moments[3].picture(60, 80)
    assert small.shape == (60, 80, 3) and abs(small.astype(int) - frames[3][::2, ::2]).mean() < 12


def turned(path, matrix):
    """Write a rotation into an mp4's track header, as a phone that was held upright does."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version and flags; times, id, length; reserved; layer, volume
    content[place : place + 36] = b"".join(int(value).to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(content)


def test_what_was_filmed_upright_is_upright(tmp_path):
    frames = shot(0, 3)
    path = write_video(tmp_path / "v.mp4", frames, 8, ENCODINGS["lossless"])
    one = 1 << 16
    turned(path, (0, one, 0, -one, 0, 0, 0, 0, 1 << 30))  # to be shown a quarter clockwise
    moment = next(iter(stream_video(path)))
    assert (moment.height, moment.width) == (160, 120)
    np.testing.assert_array_equal(moment.picture(160, 120), np.rot90(frames[0], -1))


def test_poison_is_refused_and_named(tmp_path, monkeypatch):
    whole = write_video(tmp_path / "whole.mp4", shot(0, 60)).read_bytes()
    bad = {
        "empty.mp4": (b"", "cannot decode frame 0"),
        "text.mp4": (b"not a video at all" * 99, "cannot decode frame 0"),
        "truncated.mp4": (whole[: len(whole) // 2], "cannot decode frame 0"),
        "holes.mkv": (b"\x1aE\xdf\xa3" + bytes(500), "cannot decode|holds no video"),
    }
    for name, (content, message) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{re.escape(name)}: ({message})"):
            list(stream_video(tmp_path / name))
    with pytest.raises(DataError, match="missing.mp4: the video is missing"):
        list(stream_video(tmp_path / "missing.mp4"))
    path = tmp_path / "whole.mp4"
    monkeypatch.setattr(video_stream, "LARGEST_VIDEO", 50 * 120 * 160)
    with pytest.raises(DataError, match="whole.mp4: more than 960000 pixels in all"):  # as it claims, before any frame
        next(iter(stream_video(path)))
    monkeypatch.setattr(video_stream, "LARGEST_VIDEO", 1e12)
    monkeypatch.setattr(video_stream, "LARGEST_FRAME", 120 * 160 - 1)
    with pytest.raises(DataError, match="whole.mp4: cannot decode frame 0"):
        next(iter(stream_video(path)))


def test_what_claims_little_and_holds_much_is_refused_on_the_way(tmp_path, monkeypatch):
    path = tmp_path / "bomb.ts"  # a transport stream says nothing of how many frames it has
    import av

    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 120, 160, "yuv420p"
        for frame in shot(1, 40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    assert len(list(stream_video(path))) == 40
    monkeypatch.setattr(video_stream, "LARGEST_VIDEO", 20 * 120 * 160)
    stream, seen = stream_video(path), 0
    with pytest.raises(DataError, match=r"bomb.ts: more than 384000 pixels in all; cut it into shorter videos"):
        for _ in stream:
            seen += 1
    assert seen == 20


def test_a_video_that_ends_before_its_end_is_damaged(tmp_path):
    import av

    # Its index comes first, so that a part of it opens.
    fast = tmp_path / "fast.mp4"
    with av.open(str(fast), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 120, 160, "yuv420p"
        for frame in shot(1, 60):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    fast.write_bytes(fast.read_bytes()[: int(0.7 * fast.stat().st_size)])
    with pytest.raises(DataError, match=r"fast.mp4: (ends before frame|cannot decode frame|frame) \d+"):
        list(stream_video(fast))
