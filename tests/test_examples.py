"""Every example runs from start to end on a tiny budget and does what its text says."""

from functools import partial

from scripts import ROOT, load_script

load = partial(load_script, "examples")


def test_no_example_is_left_out():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} <= tested


def test_own_policy():
    rates = load("own_policy").main(["--num-episodes", "4"])
    assert rates["twin"] >= 0.75  # it solves all 24
    assert rates.keys() == {"twin", "imagined"}


def test_rank_policies():
    differences = load("rank_policies").main(["--task", "reach_target", "--num-episodes", "2"])
    assert all(-1 <= value <= 1 for value in differences.values())


def test_imagine_beside_twin(tmp_path):
    from wfm_core.data.video import decode_video

    path = load("imagine_beside_twin").main(["--max-steps", "4", "--out", str(tmp_path / "beside.mp4")])
    frames = decode_video(path)
    assert frames.shape[0] >= 2 and frames.shape[1:] == (128, 256, 3)
    # Both start from the same scene, so the two halves of the first frame agree.
    assert abs(frames[0, :, :128].astype(float) - frames[0, :, 128:]).mean() < 8


def test_record_and_read(tmp_path):
    num_episodes = load("record_and_read").main(["--num-episodes", "2", "--out", str(tmp_path / "data")])
    assert num_episodes == 2
