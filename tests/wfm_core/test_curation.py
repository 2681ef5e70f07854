"""Measures, rules and fingerprints of clips: each fault breaks its rule, and what is well breaks none."""

import struct
import zlib
from dataclasses import replace

import cv2
import numpy as np
import pytest
from robot_clips import frozen, robot_episode, shuffled, teleported, with_frames

from wfm_core.curation import duplicates as duplicates_module
from wfm_core.curation import examine as module
from wfm_core.curation import examine_video as video_module
from wfm_core.curation.duplicates import ALIKE, APART, TRIMMED, difference, duplicates, fingerprint
from wfm_core.curation.examine import Item, count_items, examine
from wfm_core.curation.examine_video import ExamineSettings, examine_video
from wfm_core.curation.measures import JUDGED, LAGS, explained_ways, luma, measure_frames, measure_robot, motion
from wfm_core.curation.rules import RULES, Rule, broken_rule, changed_rules
from wfm_core.data.episode import OWN_ACTIONS, UNKNOWN_ACTIONS, Episode
from wfm_core.data.files import DataError
from wfm_core.data.lerobot_v3_writer import assemble_dataset, stage_episode
from wfm_core.data.video import VideoEncoding, decode_video, encode_video, resize_frames


def broken(episode: Episode, **changes) -> str | None:
    measures = measure_frames(episode.frames) | measure_robot(episode)
    return broken_rule(measures, changed_rules(changes))


@pytest.mark.parametrize("seed", range(8))
def test_what_is_well_is_kept(seed):
    assert broken(robot_episode(seed)) is None


def black(episode):
    return with_frames(episode, np.where(np.arange(25)[:, None, None, None] % 3 == 0, 0, episode.frames))


def shaken(episode):
    shifts = np.random.default_rng(0).integers(-5, 6, (len(episode.frames), 2))
    return with_frames(episode, np.stack([np.roll(f, s, (0, 1)) for f, s in zip(episode.frames, shifts, strict=True)]))


FAULTS = {
    "too_short": lambda e: replace(e, frames=e.frames[:4], actions=e.actions[:3], agent_pos=e.agent_pos[:4]),
    "too_small": lambda e: e.resized(32, 32),
    "dark": black,
    "overexposed": lambda e: with_frames(e, e.frames // 16 + 239),
    "without_contrast": lambda e: with_frames(e, e.frames // 12 + 100),
    "blurred": lambda e: with_frames(e, np.stack([cv2.GaussianBlur(f, (0, 0), 6) for f in e.frames])),
    "frozen": frozen,
    "shaky": shaken,
    "cut": lambda e: with_frames(e, np.concatenate([e.frames[:12], robot_episode(9).frames[12:]])),
    "static": lambda e: with_frames(e, np.repeat(e.frames[:1], len(e.frames), axis=0)),
    "idle": lambda e: replace(frozen(e), actions=e.actions * (np.arange(24) < 5)[:, None]),
    "gripper_never_moves": lambda e: replace(e, actions=e.actions * [1, 1, 1, 1, 1, 1, 0]),
    "teleport": teleported,
    "actions_do_not_fit_states": shuffled,
    "motion_does_not_fit_frames": lambda e: replace(shuffled(e), agent_pos=None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_breaks_its_rule(name):
    episode = FAULTS[name](robot_episode(1))
    measures = measure_frames(episode.frames) | measure_robot(episode)
    limits = {"gripper_never_moves": {"low": 0.5}, "idle": {"high": 0.5}}
    rules = changed_rules({name: limits[name]} if name in limits else {})
    assert list(FAULTS) == list(RULES)
    assert broken_rule(measures, {name: rules[name]}) == name
    well = robot_episode(1)
    assert broken_rule(measure_frames(well.frames) | measure_robot(well), rules) is None


def test_measures_of_a_picture_that_moves_as_a_whole():
    rng = np.random.default_rng(0)
    table = cv2.GaussianBlur(rng.integers(0, 255, (96, 256, 3)).astype(np.uint8), (0, 0), 2)
    panned = np.stack([table[:, 3 * t : 3 * t + 128] for t in range(20)])
    measures = measure_frames(panned)
    assert measures["camera"] == pytest.approx(3 / 128, rel=0.1) and measures["flow"] == pytest.approx(3 / 128, rel=0.2)
    assert measures["shake"] < 0.002 and measures["frozen"] == 0 and measures["num_frames"] == 20
    assert measure_frames(panned[:, :, ::-1])["camera"] == pytest.approx(measures["camera"], rel=0.1)
    still = measure_frames(panned[:1])
    assert [still[name] for name in ("frozen", "change", "cut", "flow", "camera", "shake")] == [1, 0, 0, 0, 0, 0]
    grey = measure_frames(np.full((3, 40, 50, 3), 100, np.uint8))
    assert (grey["luma"], grey["contrast"], grey["sharpness"], grey["height"], grey["width"]) == (100, 0, 0, 40, 50)


def test_measures_of_a_robot():
    episode = robot_episode(2)
    measures = measure_robot(episode)
    assert (
        measures["frame_match"] > 0.7 and measures["state_match"] == pytest.approx(1) and measures["gripper_range"] == 1
    )
    steps = np.linalg.norm(np.diff(episode.agent_pos[:, :3], axis=0), axis=1)
    assert measures["state_jump"] == pytest.approx(steps.max())
    late = replace(episode, actions=np.concatenate([episode.actions[2:], episode.actions[:2]]))  # two steps ahead
    assert measure_robot(late)["state_match"] == pytest.approx(1)
    assert "state_jump" not in measure_robot(replace(episode, agent_pos=None))
    unknown = replace(episode, actions=np.full_like(episode.actions, np.nan), convention=UNKNOWN_ACTIONS)
    assert measure_robot(unknown) == {}
    joints = replace(episode, actions=episode.actions[:, :3], agent_pos=None, convention=OWN_ACTIONS)
    assert measure_robot(joints) == {}


def test_felt_ways_are_those_of_a_sluggish_arm_that_goes_where_it_is_told():
    told = np.random.default_rng(0).normal(0, 0.01, (24, 3))
    limit = RULES["actions_do_not_fit_states"].low
    before = np.concatenate([np.zeros((1, 3)), told[:-1]])
    assert explained_ways(told, 0.6 * told + 0.3 * before) > 0.95
    for unlike in (told[:, [1, 2, 0]], -told, told[::-1], 3 * told):
        assert explained_ways(told, unlike) < limit
    stopped = told * (np.arange(24) < 9)[:, None]  # by something that it meets
    assert explained_ways(told, stopped) > 0.99
    astray = told + (np.arange(24) % 12 == 0)[:, None] * 0.1  # two steps of a sensor that jumps
    assert explained_ways(told, astray) > 0.99
    assert explained_ways(told, np.zeros_like(told)) < 0.1
    assert explained_ways(0 * told, np.zeros_like(told)) == 1


def test_motion_is_that_of_what_moves_and_not_of_the_camera():
    rng = np.random.default_rng(0)
    table, block = (cv2.GaussianBlur(rng.integers(0, 255, (96, w, 3)).astype(np.uint8), (0, 0), 2) for w in (160, 40))
    frames = np.repeat(table[None, :, :128], 8, axis=0)
    for t in range(8):
        frames[t, 30 + t : 70 + t, 60 - 2 * t : 100 - 2 * t] = block[:40]
    seen = motion(luma(frames)) / [-2, 1]  # of the truth; what the block uncovers does not move
    assert seen.min() > 0.3 and seen.max() < 1.1
    np.testing.assert_allclose(motion(luma(frames[::-1])), -motion(luma(frames))[::-1], atol=0.3)
    panned = np.stack([table[:, 2 * t : 2 * t + 128] for t in range(8)])
    np.testing.assert_allclose(motion(luma(panned)), 0, atol=0.2)
    assert not motion(luma(frames[[0, 0, 0]])).any()


@pytest.mark.parametrize("lag", [0, 2])
def test_commands_are_found_in_what_moves_whatever_the_camera_and_the_lag(lag):
    limit = RULES["motion_does_not_fit_frames"].low
    for seed in range(4):
        episode = replace(robot_episode(seed), agent_pos=None)
        turned = with_frames(episode, np.rot90(episode.frames, axes=(1, 2)))
        ahead = replace(turned, actions=np.roll(turned.actions, -lag, axis=0))
        assert measure_robot(ahead)["frame_match"] > 2 * limit
        assert measure_robot(replace(ahead, actions=robot_episode(seed + 9).actions))["frame_match"] < limit
    beyond = replace(ahead, actions=np.roll(episode.actions, -LAGS.stop, axis=0))
    assert measure_robot(beyond)["frame_match"] < limit


def test_frames_are_held_against_what_an_arm_felt_if_it_feels():
    limit = RULES["motion_does_not_fit_frames"].low
    episode, other = robot_episode(1), robot_episode(2)
    assert measure_robot(shuffled(episode))["frame_match"] > 2 * limit  # which only its commands contradict
    assert measure_robot(replace(episode, agent_pos=other.agent_pos))["frame_match"] < limit
    turning = np.zeros_like(episode.agent_pos)
    turning[:, 3:5] = episode.agent_pos[:, :2]
    assert measure_robot(replace(episode, agent_pos=turning))["frame_match"] > 2 * limit


def test_a_gripper_that_closes_is_seen_to_move():
    episode = replace(robot_episode(2), agent_pos=None)
    way = np.cumsum(episode.actions[:, 0])
    told = episode.actions.copy()
    told[:, 0], told[:, 6] = 0, (way - way.min()) / np.ptp(way)
    still = told.copy()
    still[:, 6] = 1
    closing, open_ = (measure_robot(replace(episode, actions=each))["frame_match"] for each in (told, still))
    assert closing > 0.6 and closing > open_ + 0.2


def test_what_is_too_short_or_hardly_moves_is_not_said_to_contradict_its_actions():
    some = [shuffled(robot_episode(seed, steps=JUDGED)) for seed in range(7)]
    matches = [measure_robot(replace(each, agent_pos=None))["frame_match"] for each in some]
    assert np.median(matches) < RULES["motion_does_not_fit_frames"].low  # of so few steps now and then one fits
    episode = some[1]
    short = replace(episode, frames=episode.frames[1:], actions=episode.actions[1:], agent_pos=episode.agent_pos[1:])
    assert "frame_match" not in measure_robot(short) and "state_match" in measure_robot(short)
    resting = replace(episode, agent_pos=episode.agent_pos / 100, actions=episode.actions / 100)
    assert measure_robot(episode)["state_match"] < 0.4 < 0.9 < measure_robot(resting)["state_match"]
    stuck = replace(episode, agent_pos=np.repeat(episode.agent_pos[:1], JUDGED + 1, axis=0))
    assert measure_robot(stuck)["state_match"] < 0.1
    still = with_frames(episode, np.repeat(episode.frames[:1], JUDGED + 1, axis=0))
    assert measure_robot(still)["frame_match"] == pytest.approx(1, abs=0.3)


def test_rules_can_be_changed_and_wrong_ones_are_refused():
    rules = changed_rules({"dark": {"high": 0.5}, "blurred": {"low": 1, "high": 9}})
    assert rules["dark"] == Rule("dark", high=0.5) and rules["blurred"] == Rule("sharpness", 1, 9)
    assert {name: rule for name, rule in rules.items() if rule == RULES[name]}.keys() == RULES.keys() - {
        "dark",
        "blurred",
    }
    with pytest.raises(ValueError, match=r"rules must be low or high of too_short, .*, got fog: \{'low': 1\}"):
        changed_rules({"fog": {"low": 1}})
    with pytest.raises(ValueError, match="got dark: {'most': 1}"):
        changed_rules({"dark": {"most": 1}})
    with pytest.raises(ValueError, match="needs low <= high, got 3 and 1"):
        changed_rules({"blurred": {"low": 3, "high": 1}})
    assert broken_rule({"dark": float("nan")}, RULES) == "dark"
    assert broken_rule({"num_frames": 1, "dark": 1}, RULES) == "too_short"  # the first one


# --- duplicates -------------------------------------------------------------------------------------------------------


def again(frames: np.ndarray, tmp_path) -> np.ndarray:
    """The same clip, smaller and in another encoding."""
    path = tmp_path / "again.mp4"
    path.write_bytes(
        encode_video(resize_frames(frames, 48, 48), 5, VideoEncoding("mpeg4", "yuv420p", (("qscale", "5"),)))
    )
    return decode_video(path)


def test_copies_are_found_at_other_sizes_and_encodings_and_the_largest_is_kept(tmp_path):
    clips = [robot_episode(seed).frames for seed in range(6)]
    clips += [again(clips[2], tmp_path), again(clips[4], tmp_path), clips[5]]
    prints = np.stack([fingerprint(clip) for clip in clips])
    sizes = [clip.shape[1] * clip.shape[2] for clip in clips]
    lengths = [len(clip) for clip in clips]
    assert duplicates(prints, lengths, sizes) == {6: 2, 7: 4, 8: 5}
    assert duplicates(prints, [*lengths[:7], 27, 28], sizes) == {6: 2, 7: 4}  # one is three frames longer
    order = [6, 0, 1, 7, 3, 8, 2, 4, 5]  # copies before what they were made of
    assert duplicates(prints[order], lengths, [sizes[k] for k in order]) == {0: 6, 3: 7, 8: 5}
    assert duplicates(prints, lengths, sizes, limit=-1) == {}
    assert duplicates(prints[:0], [], []) == {}


def compared_with_all(prints, lengths, preference, limit):
    """What `duplicates` finds, by comparing each with all that are kept."""
    kept, copies = [], {}
    for k in sorted(range(len(prints)), key=lambda k: (-preference[k], k)):
        near = [other for other in kept if abs(lengths[other] - lengths[k]) <= TRIMMED]
        apart = [float(difference(prints[other], prints[k])) for other in near]
        if near and min(apart) <= limit:
            copies[k] = min(zip(apart, near, strict=True))[1]
        else:
            kept.append(k)
    return copies


@pytest.mark.parametrize("limit", [0.0, ALIKE, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("scenes", [1, 300])
def test_no_copy_escapes_and_none_is_made_up(monkeypatch, limit, scenes):
    """Copies as far apart as they may be, of random pictures, and of pictures of one scene in which few cells move."""
    monkeypatch.setattr(duplicates_module, "SMALL", 8)  # so that few have many parts
    rng, cells = np.random.default_rng(0), 960
    prints = rng.normal(128, 40, (scenes, cells)).clip(16, 239).astype(np.uint8)[rng.integers(scenes, size=300)]
    prints[:, rng.permutation(cells)[:90]] = rng.integers(16, 240, (300, 90))
    allowed = int(limit * cells)
    for copy in range(150, 250):
        one, other = prints[copy - 150], rng.permutation(cells)[: allowed + copy % 2]  # one too many in every other one
        prints[copy] = one + rng.choice([-APART, APART], cells)
        prints[copy, other] = one[other] ^ 128
    lengths, sizes = rng.choice([24, 25.5, 27, 29, 40], 300).tolist(), rng.integers(3, size=300).tolist()
    found = duplicates(prints, lengths, sizes, limit)
    assert found == compared_with_all(prints, lengths, sizes, limit) and found


def test_few_are_compared_with_each_other(monkeypatch):
    compared = []
    monkeypatch.setattr(duplicates_module, "_differing", lambda a, b: compared.append(len(a)) or np.full(len(a), 99))
    prints = np.random.default_rng(0).normal(128, 40, (2000, 960)).clip(0, 255).astype(np.uint8)
    assert duplicates(prints, [25.0] * 2000, [1.0] * 2000) == {}
    assert sum(compared) < 0.6 * 2000 * 1999 / 2


def test_episodes_of_one_scene_are_told_apart_by_what_moves():
    one = robot_episode(3)
    other = with_frames(one, one.frames.copy())
    block = robot_episode(3, steps=48).frames[24:]  # of the same table, with the block elsewhere
    other.frames[1:] = block[1:25]
    prints = np.stack([fingerprint(one.frames), fingerprint(other.frames)])
    assert duplicates(prints, [25, 25], [1, 1]) == {}


# --- one item ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_a_finding(tmp_path):
    for k in range(2):
        stage_episode(tmp_path / "staging", k, robot_episode(k))
    assemble_dataset(tmp_path / "staging", tmp_path / "set")
    item = Item(str(tmp_path / "set"), "{}", 1)
    assert count_items(item.data, item.options) == 2
    found = examine(item)
    assert (found.item_id, found.error, found.convention, found.has_state) == ("episode 1", "", "commanded", True)
    again = measure_frames(robot_episode(1).frames) | measure_robot(robot_episode(1))
    assert found.measures == pytest.approx(again, rel=1e-9)
    assert bytes.fromhex(found.fingerprint) == fingerprint(robot_episode(1).frames).tobytes()
    video = next((tmp_path / "set").rglob("*.mp4"))
    video.write_bytes(video.read_bytes()[:300])
    bad = examine(item)
    assert bad.item_id == "set[1]" and bad.error.startswith("DataError: ") and bad.measures == {}
    with pytest.raises(ValueError, match=r"options must be those of the reader of .*set: .*'colour'"):
        count_items(item.data, '{"colour": 1}')
    with pytest.raises(DataError, match="no such folder"):
        count_items(str(tmp_path / "nowhere"), "{}")


@pytest.mark.parametrize(
    "error", [cv2.error("no picture"), zlib.error("torn"), KeyError("action"), struct.error("cut")]
)
def test_whatever_a_foreign_file_does_to_its_library_is_a_finding(monkeypatch, tmp_path, error):
    def breaks(*_):
        raise error

    monkeypatch.setattr(module, "read_item", breaks)
    found = examine(Item("some/set", "{}", 3))
    assert found.item_id == "set[3]" and found.error == f"{type(error).__name__}: {error}"
    monkeypatch.setattr(video_module, "split_video", breaks)
    assert examine_video(tmp_path / "a.mp4", ExamineSettings()).error == f"{type(error).__name__}: {error}"
    error = ImportError("pip install")  # which is no file's fault
    with pytest.raises(ImportError, match="pip install"):
        examine(Item("some/set", "{}", 3))
    with pytest.raises(ImportError, match="pip install"):
        examine_video(tmp_path / "a.mp4", ExamineSettings())
