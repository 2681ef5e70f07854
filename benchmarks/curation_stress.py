"""How surely worldsim-curate finds planted faults, what it drops wrongly, and how fast it is.

    python benchmarks/curation_stress.py [--quick] [--out outputs/curation] [--episodes runs/mine ...] [--workers 1 2]

Makes a stress set of more than 2,000 clips once (--quick: 200), of episodes that it records in the twin (or that
--episodes names), in four layouts: LeRobot v3.0, copies of it at another size and codec, raw BridgeData V2, and pairs
of mp4 and npz, which have no proprioception, so that there the video alone must tell whether the actions are its own.
No two clips share a frame, but for copies and cuts. Every clip has one fault, or none. Then it is curated by default
rules, as a user would, and the manifest is compared with what was planted. A fault is found if its clip is dropped for
one of the reasons in `FAULTS`; a false alarm of a fault is any other clip that is dropped for one of them, if that is
no reason for its own. The last line is one JSON object.
"""

import argparse
import json
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice, pairwise
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq

from wfm_core.curation.duplicates import fingerprint
from wfm_core.curation.examine import Findings, Item, read_item
from wfm_core.curation.measures import MEASURED, measure_frames, measure_robot
from wfm_core.curation.rules import RULES
from wfm_core.data.actions import hold_action
from wfm_core.data.episode import Episode
from wfm_core.data.lerobot_v3_writer import assemble_dataset, stage_episode
from wfm_core.data.readers import open_dataset
from wfm_core.data.video import ENCODINGS, VideoEncoding, encode_video, join_videos
from worldsim.commands.curate import DUPLICATE, EXAMINED, UNREADABLE, CurateConfig, judge, run
from worldsim.commands.record import RecordConfig
from worldsim.commands.record import run as record

STEPS, SIZE = 24, 128  # of a clip; its frames
CREEPING, MOVING = 1e-3, 0.6  # m in a step, and the share of steps in which an arm without fault goes farther
SNAP = 0.08  # m in a step, more than can be commanded
BEHAVIOURS = {"expert": 4, "miss_grasp": 1, "drop_early": 1, "wrong_object": 1, "random_walk": 1, "play": 1}
COPIES = {
    "copies_mpeg4": (96, VideoEncoding("mpeg4", "yuv420p", (("qscale", "5"), ("g", "10"), ("bf", "0")))),
    "copies_h264": (112, replace(ENCODINGS["compact"], options=(("crf", "28"), *ENCODINGS["compact"].options[1:]))),
}
BOMB_SIZE, BOMB_FRAMES = 8192, 25  # 5 GB in 100 kB
SCALE = np.array([35.0] * 3 + [5.6] * 3 + [2.0])  # of the actions of pairs, whose gripper goes from -1 to 1

type Plant = Callable[[Episode, Episode, np.random.Generator], Episode]


def with_frames(clip: Episode, frames: np.ndarray) -> Episode:
    return replace(clip, frames=frames.astype(np.uint8))


def stopped(clip: Episode) -> Episode:
    """The camera delivers the same frame from the eighth on."""
    return with_frames(clip, clip.frames[np.minimum(np.arange(STEPS + 1), 7)])


def black(clip: Episode, rng: np.random.Generator) -> Episode:
    lost = rng.permutation(STEPS + 1) < (STEPS + 1) // 3
    return with_frames(clip, np.where(lost[:, None, None, None], 0, clip.frames))


def spliced(clip: Episode, other: Episode) -> Episode:
    """Another episode goes on from the middle, with its actions and states."""
    assert clip.agent_pos is not None and other.agent_pos is not None
    half = STEPS // 2
    return replace(
        clip,
        frames=np.concatenate([clip.frames[:half], other.frames[half:]]),
        actions=np.concatenate([clip.actions[:half], other.actions[half:]]),
        agent_pos=np.concatenate([clip.agent_pos[:half], other.agent_pos[half:]]),
    )


def blurred(clip: Episode) -> Episode:
    return with_frames(clip, np.stack([cv2.GaussianBlur(frame, (0, 0), 6) for frame in clip.frames]))


def shaken(clip: Episode, rng: np.random.Generator) -> Episode:
    moved = [
        cv2.warpAffine(frame, np.array([[1, 0, x], [0, 1, y]]), (SIZE, SIZE), borderMode=cv2.BORDER_REFLECT)
        for frame, (x, y) in zip(clip.frames, rng.uniform(-5, 5, (STEPS + 1, 2)), strict=True)
    ]
    return with_frames(clip, np.stack(moved))


def teleported(clip: Episode) -> Episode:
    assert clip.agent_pos is not None
    there = (np.arange(STEPS + 1) >= STEPS // 2)[:, None] * np.array([0.15, 0, 0, 0, 0, 0, 0])
    return replace(clip, agent_pos=(clip.agent_pos + there).astype(np.float32))


def idle(clip: Episode) -> Episode:
    """The arm is told nothing after six steps, and does nothing."""
    assert clip.agent_pos is not None
    until = np.minimum(np.arange(STEPS + 1), 6)
    told = np.where((np.arange(STEPS) < 6)[:, None], clip.actions, hold_action(clip.actions[5, -1]))
    return replace(clip, frames=clip.frames[until], actions=told, agent_pos=clip.agent_pos[until])


def shuffled(clip: Episode, rng: np.random.Generator) -> Episode:
    return replace(clip, actions=rng.permutation(clip.actions))


MISMATCH = ("actions_do_not_fit_states", "motion_does_not_fit_frames")
PLANTED: dict[str, tuple[Plant, tuple[str, ...]]] = {
    "static": (lambda e, o, r: with_frames(e, e.frames[[0] * len(e.frames)]), ("static", "frozen", "idle")),
    "frozen": (lambda e, o, r: stopped(e), ("frozen",)),
    "black": (lambda e, o, r: black(e, r), ("dark",)),
    "overexposed": (lambda e, o, r: with_frames(e, e.frames // 16 + 239), ("overexposed", "without_contrast")),
    "blurred": (lambda e, o, r: blurred(e), ("blurred",)),
    "other_camera": (lambda e, o, r: spliced(e, with_frames(o, 0.6 * o.frames[:, :, ::-1])), ("cut", "teleport")),
    "shaky": (lambda e, o, r: shaken(e, r), ("shaky",)),
    "teleport": (lambda e, o, r: teleported(e), ("teleport",)),
    "idle": (lambda e, o, r: idle(e), ("idle", "frozen")),
    "shuffled_actions": (lambda e, o, r: shuffled(e, r), MISMATCH),
    "actions_of_another": (lambda e, o, r: replace(e, actions=o.actions), MISMATCH),
}
"""Fault -> how it is planted in a clip, given another one, and the reasons that name it."""
POISONS: dict[str, Callable[[bytes, bytes, bytes], tuple[bytes, bytes]]] = {
    "truncated": lambda video, table, bomb: (video[: len(video) // 2], table),
    "empty": lambda video, table, bomb: (b"", table),
    "not_a_video": lambda video, table, bomb: (b"a text in place of a video", table),
    "not_a_table": lambda video, table, bomb: (video, table[: len(table) // 2]),
    "bomb": lambda video, table, bomb: (bomb, table),
}
"""Fault -> video and table of a pair, given whole ones and a decompression bomb."""
FAULTS = {
    **{name: reasons for name, (_, reasons) in PLANTED.items()},
    "shuffled_actions_without_states": MISMATCH[1:],
    "copy": (DUPLICATE,),
    **dict.fromkeys((*POISONS, "malicious_pickle"), (UNREADABLE,)),
}
"""Fault -> the reasons that name it."""


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@dataclass(frozen=True)
class Plan:
    """How many clips of each kind, with each fault and without any in each layout, and of which draw."""

    fault: int
    clean: int
    seed: int

    def lerobot(self) -> list[str]:
        kinds = [""] * self.clean + [name for name in PLANTED for _ in range(self.fault)]
        return [kinds[k] for k in np.random.default_rng(self.seed).permutation(len(kinds))]

    def num_bases(self) -> int:
        return len(self.lerobot()) + 4 * self.fault


def clips(folders: Sequence[Path]) -> Iterator[Episode]:
    """Cut episodes into clips in which the arm moves and does not snap free of what held it; no two share a frame."""
    for folder in folders:
        for episode in open_dataset(folder):
            assert episode.agent_pos is not None
            for start in range(0, len(episode.actions) - STEPS + 1, STEPS + 1):
                poses = episode.agent_pos[start : start + STEPS + 1]
                moves = np.linalg.norm(np.diff(poses[:, :3], axis=0), axis=1)
                if len(poses) == STEPS + 1 and (moves > CREEPING).mean() >= MOVING and moves.max() < SNAP:
                    yield replace(
                        episode,
                        frames=episode.frames[start : start + STEPS + 1],
                        actions=episode.actions[start : start + STEPS],
                        agent_pos=poses,
                        labels={},
                        meta={},
                        episode_id=f"{folder.name}/{episode.episode_id}@{start}",
                    )


def make(out: Path, plan: Plan, episodes: Sequence[Path]) -> dict[str, list[str]]:
    """Make the stress set, if it is not there yet; folder -> fault of each of its items, "" for none."""
    told, rng = out / "truth.json", np.random.default_rng(plan.seed)
    if told.exists():
        return json.loads(told.read_text())
    if not episodes:
        episodes = [out / "recorded"]
        num = plan.num_bases() + 1  # of most two clips can be made, of short ones none
        record(
            RecordConfig(
                str(episodes[0]), behaviours=BEHAVIOURS, num_episodes=num, max_steps=2 * STEPS + 1, seed=plan.seed
            )
        )
    for leftover in (name for name in ("robot", *COPIES, "raw", "pairs") if (out / name).exists()):
        shutil.rmtree(out / leftover)
    bases = islice(clips(episodes), plan.num_bases() + 1)
    truth: dict[str, list[str]] = {"robot": plan.lerobot(), **{name: [] for name in COPIES}, "raw": [], "pairs": []}
    with tempfile.TemporaryDirectory(dir=out) as staging:
        copies = cycle(COPIES)
        taken = 0
        # The kinds come first: zip asks no base for a clip that it has no kind for, so that none is lost.
        for kind, (clip, other) in zip(truth["robot"], pairwise(bases), strict=False):
            planted = PLANTED[kind][0](clip, other, rng) if kind else clip
            stage_episode(Path(staging, "robot"), taken, planted)
            taken += 1
            if not kind and sum(len(truth[name]) for name in COPIES) < plan.fault:
                name = next(copies)
                size, encoding = COPIES[name]
                copy = replace(clip.resized(size, size), episode_id=f"copy of {clip.episode_id}")
                stage_episode(Path(staging, name), len(truth[name]), copy, encoding)
                truth[name].append("copy")
        assemble_dataset(Path(staging, "robot"), out / "robot")
        for name, (_, encoding) in COPIES.items():
            assemble_dataset(Path(staging, name), out / name, encoding=encoding)
        bombs = Path(staging, "bomb.mp4")
        flat = np.zeros((1, BOMB_SIZE, BOMB_SIZE, 3), np.uint8)
        bombs.write_bytes(encode_video(flat, 5, ENCODINGS["compact"]))
        bomb = join_videos([(bombs, 1)] * BOMB_FRAMES, 5)
    rest = list(bases)
    if taken < len(truth["robot"]) or len(rest) < 4 * plan.fault - 1:
        raise SystemExit(f"{plan.num_bases() + 1} clips are needed; record more episodes than those of {episodes}")
    make_raw(out / "raw", rest[: plan.fault], plan.fault, out / "marker", truth["raw"])
    make_pairs(out / "pairs", rest[plan.fault :], plan.fault, bomb, truth["pairs"], rng)
    told.write_text(json.dumps(truth))
    return truth


def make_raw(folder: Path, whole: Sequence[Episode], num_malicious: int, marker: Path, truth: list[str]) -> None:
    for k in range(len(whole) + num_malicious):
        clip, malicious = whole[k % len(whole)], k >= len(whole)
        place = folder / "2023-01-01_00-00-00" / "raw" / "traj_group0" / f"traj{k:04d}"
        (place / "images0").mkdir(parents=True)
        for number, frame in enumerate(clip.frames):
            cv2.imwrite(str(place / "images0" / f"im_{number}.jpg"), frame[..., ::-1])
        states = {"full_state": Malicious(marker) if malicious else clip.agent_pos}
        (place / "obs_dict.pkl").write_bytes(pickle.dumps(states))
        (place / "policy_out.pkl").write_bytes(pickle.dumps([{"actions": action} for action in clip.actions]))
        truth.append("malicious_pickle" if malicious else "")


def make_pairs(
    folder: Path, bases: Sequence[Episode], num: int, bomb: bytes, truth: list[str], rng: np.random.Generator
) -> None:
    """A third of the clips gets shuffled actions; poisons are made of the first one."""
    folder.mkdir()
    whole = [("" if k % 3 else "shuffled_actions_without_states") for k in range(len(bases))]
    for k, kind in enumerate([*whole, *(name for name in POISONS for _ in range(num))]):
        clip = bases[k % len(bases)]
        clip = shuffled(clip, rng) if k < len(whole) and kind else clip
        scaled = np.concatenate([clip.actions, clip.actions[-1:]]) * SCALE - [0, 0, 0, 0, 0, 0, 1]
        video, table = folder / f"{k:05d}.mp4", folder / f"{k:05d}.npz"
        np.savez(table, arr_0=scaled)
        whole_pair = encode_video(clip.frames, 5, ENCODINGS["compact"]), table.read_bytes()
        one, other = POISONS[kind](*whole_pair, bomb) if kind in POISONS else whole_pair
        video.write_bytes(one)
        table.write_bytes(other)
        truth.append(kind)


def curate(out: Path, truth: dict[str, list[str]], workers: int) -> tuple[list[dict], float]:
    """Rows of the manifests, each with its `fault`, and seconds; clips with and without states are curated apart."""
    rows, start = [], time.perf_counter()
    for name, sets in (("curated", [name for name in truth if name != "pairs"]), ("curated_pairs", ["pairs"])):
        folder = out / f"{name}_by_{workers}"
        shutil.rmtree(folder, ignore_errors=True)
        run(CurateConfig(data=[str(out / each) for each in sets], out=str(folder), size=SIZE, workers=workers))
        made = pq.read_table(folder / "manifest.parquet").to_pylist()
        faults = [fault for each in sets for fault in truth[each]]
        rows += [row | {"fault": fault} for row, fault in zip(made, faults, strict=True)]
    return rows, time.perf_counter() - start


def score(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Precision and recall of each fault that was planted."""
    scores = {}
    for fault, reasons in FAULTS.items():
        planted = [row for row in rows if row["fault"] == fault]
        found = sum(row["reason"] in reasons for row in planted)
        wrong = sum(
            row["reason"] in reasons and row["reason"] not in FAULTS.get(row["fault"], ())
            for row in rows
            if row["fault"] != fault
        )
        precision = found / (found + wrong) if found + wrong else 0.0
        scores[fault] = {
            "planted": len(planted),
            "precision": precision,
            "recall": found / len(planted),
            "wrong": wrong,
        }
    return scores


def stages(out: Path, num: int, curated: Path) -> dict[str, float]:
    """Items per second of each stage by itself, in this process; what was found of them all lies in `curated`."""
    items = [Item(str(out / "robot"), "{}", k) for k in range(num)]
    found = [Findings(**json.loads(path.read_text())) for path in (curated / EXAMINED).glob("item-*.json")]
    rates = {}

    def timed(name: str, work: Callable[[], list], done: int = num) -> list:
        start = time.perf_counter()
        result = work()
        rates[name] = done / (time.perf_counter() - start)
        return result

    whole = timed("read", lambda: [read_item(item) for item in items])
    small = timed("resize", lambda: [clip.resized(*MEASURED) for clip in whole])
    timed("measure", lambda: [measure_frames(clip.frames) | measure_robot(clip) for clip in small])
    timed("fingerprint", lambda: [fingerprint(clip.frames) for clip in small])
    timed("decide", lambda: judge(found, RULES, CurateConfig(["."]).alike), len(found))
    with tempfile.TemporaryDirectory() as folder:
        timed("write", lambda: [stage_episode(Path(folder), k, clip) for k, clip in enumerate(whole)])
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 clips, in about a minute")
    parser.add_argument("--out", type=Path, default=Path("outputs/curation"), help="where the sets are made, and kept")
    parser.add_argument("--episodes", type=Path, nargs="*", default=[], help="recorded ones, instead of new ones")
    parser.add_argument("--seed", type=int, default=5, help="of episodes and faults; another one needs another --out")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes, one run each")
    arguments = parser.parse_args()
    out = arguments.out / ("quick" if arguments.quick else "full")
    out.mkdir(parents=True, exist_ok=True)
    counts = (5, 95) if arguments.quick else (60, 900)
    truth = make(out, Plan(*counts, arguments.seed), arguments.episodes)
    num_clips = sum(map(len, truth.values()))

    rates, rows = {}, []
    for workers in arguments.workers:
        rows, seconds = curate(out, truth, workers)
        rates[str(workers)] = num_clips / seconds
    scores = score(rows)
    print(f"\n{'fault':>32} planted precision recall  false alarms")
    for fault, each in scores.items():
        print(f"{fault:>32} {each['planted']:7} {each['precision']:9.3f} {each['recall']:6.3f} {each['wrong']:6}")
    for row in rows:
        if row["reason"] not in FAULTS.get(row["fault"], ("",)):
            print(f"{row['fault'] or 'clean':>32} {row['reason'] or 'kept'} {row['value']} {row['item']}")
    figures = {
        "min_precision": min(each["precision"] for each in scores.values()),
        "min_recall": min(each["recall"] for each in scores.values()),
        "items_per_s": max(rates.values()),
        "items_per_s_by_workers": rates,
        "stages_per_s": stages(out, min(64, len(truth["robot"])), out / f"curated_by_{arguments.workers[-1]}"),
        "num_clips": num_clips,
        "clean_dropped": sum(not row["fault"] and not row["kept"] for row in rows),
        "pickle_has_run": (out / "marker").exists(),
        "faults": scores,
        "quick": arguments.quick,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
