"""worldsim-curate kind=video: what is kept and why, the same bits by whatever executor, through kills and poison."""

import contextlib
import importlib.util
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import av
import cv2
import deadly
import numpy as np
import pyarrow.parquet as pq
import pytest
from moving_pictures import shot, texture, view, write_video

from wfm_core.curation.captions import CaptionSettings, RefusedError
from wfm_core.curation.shards import read_shard
from wfm_core.curation.split import SplitSettings
from wfm_core.curation.transcode import TranscodeSettings
from wfm_core.data.video import VideoEncoding, decode_video, resize_frames
from worldsim import curation, curation_video
from worldsim.commands.curate import CurateConfig, run
from worldsim.curation_video import ExamineSettings, VideoSettings
from worldsim.processes import run_all

ROOT = Path(__file__).parents[2]
SETTINGS = {"rules": {"blurred": {"low": 0}, "text_overlay": {"high": 99}}, "workers": 0}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Two shots in one file, a small copy of the first, a still one, a dark one, a long one, a file that is none."""
    root = tmp_path_factory.mktemp("planted")
    write_video(root / "a.mp4", np.concatenate([shot(0, 20), shot(1, 16)]))
    again = VideoEncoding("mpeg4", "yuv420p", (("qscale", "3"), ("g", "50")))
    write_video(root / "b" / "copy.MP4", resize_frames(shot(0, 20), 90, 120), encoding=again)
    write_video(root / "b" / "dark.mp4", shot(3, 15) // 20)
    write_video(root / "c_still.mp4", np.repeat(shot(4, 1), 15, axis=0))
    write_video(root / "d_long.mp4", shot(5, 45))
    (root / "e_broken.mp4").write_bytes(b"no video")
    (root / "notes.txt").write_text("no video either")
    return root


def video(**changes):
    split = SplitSettings(longest=3.0)
    return VideoSettings(**{"examine": ExamineSettings(split=split), "similar": 1.1, "shard": 2} | changes)


def config(data, out, settings=None, **changes):
    return CurateConfig([str(data)], str(out), "video", video=settings or video(), **SETTINGS | changes)


def manifest(out):
    return pq.read_table(out / "manifest.parquet").to_pylist()


def files(folder):
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def whole(planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    run(config(planted, out))
    return out


EXPECTED = [  # file, first frame, reason
    ("a.mp4", 0, ""),
    ("a.mp4", 20, ""),
    ("copy.MP4", 0, "duplicate"),
    ("dark.mp4", 0, "dark"),
    ("c_still.mp4", 0, "frozen"),
    ("d_long.mp4", 0, ""),
    ("d_long.mp4", 30, ""),
    ("e_broken.mp4", None, "unreadable"),
]


def test_every_input_is_accounted_for(planted, whole):
    rows = manifest(whole)
    assert [(Path(row["data"]).name, row["first_frame"], row["reason"]) for row in rows] == EXPECTED
    assert [row["kept"] for row in rows] == [not reason for *_, reason in EXPECTED]
    assert rows[2]["kept_instead"] == rows[0]["item"] == "0000000-00000" and rows[2]["value"] <= 0.08
    assert rows[3]["value"] == rows[3]["dark"] == 1 > rows[3]["high"] and "cannot decode" in rows[7]["error"]
    assert rows[5]["seconds"] == pytest.approx(3) and rows[6]["start_s"] == pytest.approx(3)
    assert not (whole / ".staging").exists()
    card = (whole / "CARD.md").read_text()
    assert "4 of 7 clips kept" in card and "| duplicate | 1 |" in card and "| unreadable | 1 |" in card
    assert "| static | 4 |" in card and "| num_frames | 15 |" in card


def test_shards_hold_the_kept_clips_with_all_that_is_known_of_them(planted, whole, tmp_path):
    rows = {row["item"]: row for row in manifest(whole) if row["kept"]}
    paths = sorted(path.relative_to(whole).as_posix() for path in whole.rglob("*.tar"))
    folder = "shards/resolution_0/aspect_4_3/frames_0_255"
    assert paths == [f"{folder}/part-000000.tar", f"{folder}/part-000001.tar"]
    seen = []
    for path in paths:
        for key, sample in read_shard(whole / path):
            seen.append(key)
            assert rows[key]["shard"] == path and sample.keys() == {"mp4", "json", "npy"}
            about = json.loads(sample["json"])
            assert about["source"] == rows[key]["data"] and about["caption"] == "" and about["tags"] == ["static"]
            assert about["measures"]["luma"] == rows[key]["luma"] and about["clip_fps"] == 10
            assert np.load(io.BytesIO(sample["npy"])).shape == (72,)
            (tmp_path / "clip.mp4").write_bytes(sample["mp4"])
            assert len(decode_video(tmp_path / "clip.mp4")) == rows[key]["num_frames"]
            if key == "0000000-00001":
                difference = np.abs(decode_video(tmp_path / "clip.mp4").astype(int) - shot(1, 16)).mean()
    assert seen == sorted(rows) and difference < 6


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_executors_change_nothing(planted, whole, tmp_path, executor):
    if executor == "ray" and not importlib.util.find_spec("ray"):
        pytest.skip("the extra ray is not installed")
    run(config(planted, tmp_path / "out", workers=2, executor=executor))
    assert files(whole) == files(tmp_path / "out")
    if executor == "ray":
        import ray

        ray.shutdown()


@pytest.mark.parametrize("stage", ["examined/item-*.json", ".staging/*.mp4", "shards/**/*.tar"])
def test_kills_change_nothing(planted, whole, tmp_path, stage):
    settings = ["video.examine.split.longest=3.0", "video.similar=1.1", "video.shard=2", "kind=video", "workers=0"]
    settings += [f"data=[{planted}]", f"out={tmp_path / 'cut'}", "+rules={blurred: {low: 0}, text_overlay: {high: 99}}"]
    arguments = [sys.executable, "-m", "worldsim.commands.curate", *settings]
    killed = subprocess.Popen(arguments, cwd=ROOT, start_new_session=True)
    while not list((tmp_path / "cut").glob(stage)):
        assert killed.poll() is None, "it ended before it was killed"
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob(stage)}
    run(config(planted, tmp_path / "cut"))
    assert files(whole) == files(tmp_path / "cut")
    assert all(path.stat().st_mtime_ns == when for path, when in done.items() if path.exists())  # not made again


def test_captions_are_asked_for_once_and_a_silent_endpoint_loses_nothing(planted, tmp_path, monkeypatch):
    asked = []

    def caption(frames, settings):
        if len(asked) == 2 and settings.url == "http://bad":
            raise ConnectionError("no caption")
        asked.append(len(frames))
        return f"caption {len(asked)}"

    monkeypatch.setattr(curation_video, "caption", caption)
    with pytest.raises(ConnectionError, match="no caption"):
        run(config(planted, tmp_path / "out", video(captions=CaptionSettings("http://bad", "m"))))
    assert len(asked) == 2
    run(config(planted, tmp_path / "out", video(captions=CaptionSettings("http://good", "m"))))
    captions = [
        json.loads(sample["json"])["caption"]
        for path in sorted((tmp_path / "out").rglob("*.tar"))
        for _, sample in read_shard(path)
    ]
    assert captions == [f"caption {k}" for k in range(1, 5)] and asked == [20, 16, 30, 15]


def test_who_is_refused_a_caption_has_none(planted, tmp_path, monkeypatch):
    def caption(frames, settings):
        if len(frames) == 16:
            raise RefusedError("no caption\nfrom x: 400")
        return "a caption"

    monkeypatch.setattr(curation_video, "caption", caption)
    asking = video(captions=CaptionSettings("http://good", "m"))
    run(config(planted, tmp_path / "out", asking))
    rows = [row for row in manifest(tmp_path / "out") if row["kept"]]
    assert [row["error"] for row in rows] == ["", "no caption from x: 400", "", ""]
    samples = {k: s for path in (tmp_path / "out").rglob("*.tar") for k, s in read_shard(path)}
    assert [json.loads(samples[row["item"]]["json"])["caption"] for row in rows] == [
        "a caption",
        "",
        "a caption",
        "a caption",
    ]
    said = "1 of the kept have no caption; of the first it is said: no caption from x: 400"
    assert said in (tmp_path / "out" / "CARD.md").read_text()
    before = files(tmp_path / "out")
    run(config(planted, tmp_path / "out", asking))
    assert files(tmp_path / "out") == before


def test_balance_and_near_copies_are_accounted_for(planted, tmp_path):
    few = video(most_per_tag=3, transcode=TranscodeSettings(side=60, fps=5.0))
    run(config(planted, tmp_path / "few", few))
    rows = [row for row in manifest(tmp_path / "few") if row["reason"] == "too_many_alike"]
    assert len(rows) == 1 and rows[0]["value"] == 4 and rows[0]["tags"] == "static"
    assert rows[0]["cluster"] is None  # nobody asked for clusters
    (_, sample), *_ = read_shard(next((tmp_path / "few").rglob("part-000000.tar")))
    (tmp_path / "clip.mp4").write_bytes(sample["mp4"])
    assert decode_video(tmp_path / "clip.mp4").shape == (10, 60, 80, 3)
    run(config(planted, tmp_path / "one", video(similar=-1.0, clusters=1)))  # all of one cluster are alike
    reasons = [row["reason"] for row in manifest(tmp_path / "one") if row["kept_instead"]]
    assert reasons == ["similar", "duplicate", "similar", "similar"]


def test_camera_motion_is_named_in_the_manifest(tmp_path):
    picture = texture(1)
    write_video(tmp_path / "in" / "pan.mp4", np.stack([view(picture, x=3 * t) for t in range(20)]))
    run(config(tmp_path / "in", tmp_path / "out"))
    assert [row["tags"] for row in manifest(tmp_path / "out")] == ["pan_right"]


def lossless(path, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_transcoded_is_dropped_and_accounted_for(tmp_path, workers):
    write_video(tmp_path / "in" / "a.mp4", shot(0, 15))
    lossless(tmp_path / "in" / "wide.mkv", np.repeat(shot(1, 15), 107, axis=2))  # wider than h264 can be
    run(config(tmp_path / "in", tmp_path / "out", workers=workers))
    good, bad = manifest(tmp_path / "out")
    assert good["kept"] and good["error"] == "" and good["shard"]
    assert (bad["kept"], bad["reason"], bad["shard"]) == (False, "not_transcoded", "")
    assert "wide.mkv: cannot encode frame 0, 17120 x 120" in bad["error"]
    assert "| not_transcoded | 1 |" in (tmp_path / "out" / "CARD.md").read_text()
    assert [key for path in (tmp_path / "out").rglob("*.tar") for key, _ in read_shard(path)] == [good["item"]]
    before = files(tmp_path / "out")
    run(config(tmp_path / "in", tmp_path / "out"))
    assert files(tmp_path / "out") == before
    (tmp_path / "in" / "a.mp4").unlink()
    with pytest.raises(ValueError, match="nothing is kept of 1 clips .*1 not_transcoded"):
        run(config(tmp_path / "in", tmp_path / "none"))
    assert [row["reason"] for row in manifest(tmp_path / "none")] == ["not_transcoded"]


def test_who_kills_its_encoder_costs_itself_alone(tmp_path, monkeypatch):
    for k in range(3):
        write_video(tmp_path / "in" / f"{k}.mp4", shot(k, 15))
    monkeypatch.setattr(curation_video, "_transcode", deadly.transcode)
    run(config(tmp_path / "in", tmp_path / "out", workers=2))
    assert [(row["reason"], row["error"]) for row in manifest(tmp_path / "out")] == [
        ("", ""),
        ("", ""),
        ("not_transcoded", curation_video.KILLED),
    ]


def test_clips_of_files_whose_times_start_anew_are_not_shown_but_kept(tmp_path):
    (tmp_path / "in").mkdir()
    joined = b""
    for seed in range(2):
        part = io.BytesIO()
        with av.open(part, "w", format="mpegts") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = 120, 160, "yuv420p"
            for frame in shot(seed, 20):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        joined += part.getvalue()
    (tmp_path / "in" / "joined.ts").write_bytes(joined)
    run(config(tmp_path / "in", tmp_path / "out"))
    assert [row["kept"] for row in manifest(tmp_path / "out")] == [True, True]
    sheet = cv2.imread(str(tmp_path / "out" / "contact.png"))
    assert (sheet[16:112, 128:256] == 255).all()


def test_a_dangling_link_is_an_unreadable_video(tmp_path):
    write_video(tmp_path / "in" / "a.mp4", shot(0, 15))
    (tmp_path / "in" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    run(config(tmp_path / "in", tmp_path / "out"))
    assert [(row["reason"], "missing" in row["error"]) for row in manifest(tmp_path / "out")] == [
        ("", False),
        ("unreadable", True),
    ]


def test_workers_may_be_elsewhere_and_are_sent_their_own_clips_alone(tmp_path, monkeypatch):
    write_video(tmp_path / "here" / "in" / "a.mp4", shot(0, 15))
    sent = []

    def run_elsewhere(function, arguments, workers, executor="local"):
        arguments = list(arguments)
        sent.extend(pickle.dumps((function, argument)) for argument in arguments)
        with contextlib.chdir(tmp_path):
            yield from run_all(function, arguments, 0)

    for module in (curation, curation_video):
        monkeypatch.setattr(module, "run_all", run_elsewhere)
    monkeypatch.chdir(tmp_path / "here")
    run(config("in", "out"))
    assert [row["data"] for row in manifest(tmp_path / "here" / "out")] == [str(tmp_path / "here" / "in" / "a.mp4")]
    assert len(sent) == 3 and not any(b"Clips" in each for each in sent)


def test_other_settings_or_inputs_are_refused(planted, whole, tmp_path):
    with pytest.raises(ValueError, match=r"begun with other settings \(examine: .*'longest': 3.0.*now.*'longest': 2.0"):
        run(config(planted, whole, video(examine=ExamineSettings(split=SplitSettings(longest=2.0)))))
    with pytest.raises(ValueError, match=r"begun with other settings \(.*shard"):
        run(config(planted, whole, video(shard=3)))
    with pytest.raises(ValueError, match="nothing is kept of 8 clips and unreadable videos: .*7 too_brief"):
        run(config(planted, tmp_path / "none", rules={"too_brief": {"low": 99}}))
    assert [row["reason"] for row in manifest(tmp_path / "none")].count("too_brief") == 7
    with pytest.raises(ValueError, match="nothing is kept"):  # other settings may be tried in the same folder
        run(config(planted, tmp_path / "none", rules={"too_brief": {"low": 98}}))
    with pytest.raises(ValueError, match="no videos"):
        run(config(tmp_path / "none" / "examined", tmp_path / "empty"))
    with pytest.raises(ValueError, match="shard must be >= 1"):
        VideoSettings(shard=0)
