"""Transcoding: the right frames, size and rate, and the same bytes each time."""

from fractions import Fraction

import numpy as np
import pytest
from moving_pictures import shot, write_video

from wfm_core.curation.transcode import Span, TranscodeSettings, output_rate, output_size, transcode
from wfm_core.data.video import decode_video
from wfm_core.data.video_stream import stream_video


def test_each_span_becomes_a_video_of_its_frames(tmp_path):
    frames = np.concatenate([shot(0, 10), shot(1, 14)])
    path = write_video(tmp_path / "v.mp4", frames)
    spans = {"late": Span(15, 6), "early": Span(2, 8)}
    made = dict(transcode(path, spans, TranscodeSettings(crf=10)))
    assert list(made) == ["early", "late"]
    for name, span in spans.items():
        (tmp_path / f"{name}.mp4").write_bytes(made[name])
        decoded = decode_video(tmp_path / f"{name}.mp4")
        expected = frames[span.first : span.first + span.num_frames]
        assert decoded.shape == expected.shape and np.abs(decoded.astype(int) - expected).mean() < 6
    moment = next(iter(stream_video(tmp_path / "late.mp4")))
    assert moment.fps == 10
    for _ in range(8):
        assert made == dict(transcode(path, spans, TranscodeSettings(crf=10)))


def test_size_and_rate_are_as_they_are_set(tmp_path):
    path = write_video(tmp_path / "v.mp4", shot(0, 20))
    for fps, count in ((5.0, 10), (20.0, 39), (0.0, 20)):
        ((_, content),) = transcode(path, {"a": Span(0, 20)}, TranscodeSettings(side=64, fps=fps))
        (tmp_path / "a.mp4").write_bytes(content)
        assert decode_video(tmp_path / "a.mp4").shape == (count, 64, 86, 3)
    assert output_size(1080, 1920, 480) == (480, 854) and output_size(1920, 1080, 480) == (854, 480)
    assert output_size(241, 321, 480) == (240, 320) and output_size(1080, 1920, 0) == (1080, 1920)
    assert output_rate(Fraction(30000, 1001), TranscodeSettings()) == Fraction(30000, 1001)
    assert output_rate(Fraction(30), TranscodeSettings(fps=12.5)) == Fraction(25, 2)


def test_what_makes_no_sense_is_refused(tmp_path):
    path = write_video(tmp_path / "v.mp4", shot(0, 10))
    with pytest.raises(ValueError, match="spans must not overlap"):
        list(transcode(path, {"a": Span(0, 6), "b": Span(5, 2)}, TranscodeSettings()))
    with pytest.raises(ValueError, match=r"spans must lie within .*v.mp4, got Span\(first=8, num_frames=3\)"):
        list(transcode(path, {"a": Span(8, 3)}, TranscodeSettings()))
    with pytest.raises(ValueError, match=r"crf in \[0, 51\], got 480, 0.0, 99"):
        TranscodeSettings(crf=99)
