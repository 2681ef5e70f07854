"""Shards: where a clip goes, and that any reader of WebDataset's layout finds its samples."""

import io
import tarfile

import pytest

from wfm_core.curation.shards import read_shard, shard_folder, write_shard
from wfm_core.data.files import DataError


def test_clips_of_one_form_lie_together():
    assert shard_folder(480, 640, 255) == "resolution_480/aspect_4_3/frames_0_255"
    assert shard_folder(240, 426, 256) == "resolution_240/aspect_16_9/frames_256_511"
    assert shard_folder(426, 240, 5) == "resolution_240/aspect_9_16/frames_0_255"
    assert shard_folder(100, 104, 5) == "resolution_0/aspect_1_1/frames_0_255"


def test_samples_come_out_as_they_went_in(tmp_path):
    samples = [("0-1", {"mp4": b"film", "json": b"{}"}), ("0-2", {"mp4": b"", "npy": b"\0" * 700})]
    buffers = [io.BytesIO(), io.BytesIO()]
    for buffer in buffers:
        write_shard(buffer, iter(samples))
    assert buffers[0].getvalue() == buffers[1].getvalue()
    (path := tmp_path / "part.tar").write_bytes(buffers[0].getvalue())
    assert list(read_shard(path)) == samples
    with tarfile.open(path) as archive:  # side by side, of the same name up to the first dot, with no date
        assert archive.getnames() == ["0-1.mp4", "0-1.json", "0-2.mp4", "0-2.npy"]
        assert {member.mtime for member in archive} == {0}
    with pytest.raises(ValueError, match="a key must have no dot, got a.b"):
        write_shard(io.BytesIO(), [("a.b", {})])
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match="part.tar: not a readable shard"):
        list(read_shard(path))
