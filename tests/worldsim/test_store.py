import json
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet
import pytest

from tasks.task import REWARD_TERMS
from worldsim.evaluate import Cell, EpisodeRecord, Trace
from worldsim.store import EpisodeStore, write_parquet

CELL = Cell("bc", "hash-p", "imagined", "hash-w", "stack_cubes", '{"horizon": 60}')
PAIRS = [(k, 10 + k) for k in range(5)]


def record(pair=(0, 10), cell=CELL, **changes):
    terms = dict.fromkeys(REWARD_TERMS, 1 / 3)
    start = EpisodeRecord(
        **asdict(cell), initial_state=pair[0], seed=pair[1], success=True, episode_return=0.1 + 0.2, length=7
    )
    start = replace(start, end_reason="success", final_terms=terms, mean_terms=terms, wall_time=1.5)
    return replace(start, **changes)


def trace():
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    return Trace(frames, np.arange(28, dtype=np.float32).reshape(4, 7), np.ones((3, 7), np.float32))


def only_file(store_dir):
    (path,) = (store_dir / "episodes").glob("*.jsonl")
    return path


def test_what_is_appended_is_read_back_equal(tmp_path):
    written = [record(pair, max_uncertainty=float("inf") if pair[0] == 1 else 0.1) for pair in PAIRS]
    with EpisodeStore(tmp_path) as store:
        for one in written:
            store.append(one)
        assert store.records() == written
    assert EpisodeStore(tmp_path).records() == written


def test_missing_and_find_follow_the_request(tmp_path):
    store = EpisodeStore(tmp_path)
    store.append(record(PAIRS[3]))
    store.append(record(PAIRS[1]))
    assert store.missing(CELL, PAIRS) == [PAIRS[0], PAIRS[2], PAIRS[4]]
    assert [r.pair for r in store.find(CELL, PAIRS)] == [PAIRS[1], PAIRS[3]]
    for other in (replace(CELL, policy_hash="x"), replace(CELL, world_hash="x"), replace(CELL, settings="{}")):
        assert store.missing(other, PAIRS) == PAIRS
    # The same checkpoint under another name is the same policy, and is reported under the name asked for.
    assert [r.policy for r in store.find(replace(CELL, policy="copy of bc"), PAIRS)] == ["copy of bc"] * 2


def test_torn_last_line_costs_one_episode_only(tmp_path, caplog):
    with EpisodeStore(tmp_path) as store:
        for pair in PAIRS[:3]:
            store.append(record(pair))
    path = only_file(tmp_path)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in [ends[1] + 1, ends[1] + 40, ends[2] - 1]:  # killed just after, within and at the end of a line
        path.write_bytes(whole[:size])
        with caplog.at_level(logging.WARNING), EpisodeStore(tmp_path) as store:
            assert [r.pair for r in store.records()] == PAIRS[:2]
            assert "unfinished line" in caplog.text
            store.append(record(PAIRS[2]))  # goes to a file of its own, so the torn line stays the last of its file
        assert [r.pair for r in EpisodeStore(tmp_path).records()] == PAIRS[:3]
        for extra in set((tmp_path / "episodes").glob("*.jsonl")) - {path}:
            extra.unlink()


def test_damage_elsewhere_is_named(tmp_path):
    with EpisodeStore(tmp_path) as store:
        for pair in PAIRS[:3]:
            store.append(record(pair))
    path = only_file(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:30], lines[2]]) + "\n")
    with pytest.raises(ValueError, match=rf"{path.name}, line 2 must be an episode record"):
        EpisodeStore(tmp_path)
    path.write_text(json.dumps({"unknown": 1}) + "\n" + lines[0] + "\n")
    with pytest.raises(ValueError, match="line 1 .*unknown"):
        EpisodeStore(tmp_path)


def test_merge_is_a_union_in_any_order(tmp_path):
    parts = []
    for name, pairs in {"a": PAIRS[:3], "b": PAIRS[2:]}.items():
        with EpisodeStore(tmp_path / name) as store:
            for pair in pairs:
                store.append(record(pair), trace() if pair == PAIRS[4] else None)
        parts.append(EpisodeStore(tmp_path / name))
    merged = []
    for name, order in {"ab": parts, "ba": parts[::-1]}.items():
        with EpisodeStore(tmp_path / name) as store:
            assert store.merge(*order) == 5
            assert store.merge(*order) == 0
        merged.append(EpisodeStore(tmp_path / name))
    assert merged[0].records() == merged[1].records() == [record(pair) for pair in PAIRS]
    assert np.array_equal(merged[0].trace(record(PAIRS[4])).frames, trace().frames)


def test_contradicting_duplicates_are_told_and_resolved_alike(tmp_path, caplog):
    yes, no = record(), record(success=False, end_reason="horizon")
    kept = []
    for name, order in {"yn": (yes, no), "ny": (no, yes)}.items():
        with caplog.at_level(logging.WARNING), EpisodeStore(tmp_path / name) as store:
            for one in order:
                store.append(one)
            kept += store.records()
        assert "not deterministic" in caplog.text
        caplog.clear()
    assert kept[0] == kept[1]
    assert len(kept) == 2


def test_trace_round_trip_and_absence(tmp_path):
    with EpisodeStore(tmp_path) as store:
        store.append(record(PAIRS[0]), trace())
        store.append(record(PAIRS[1]))
    store = EpisodeStore(tmp_path)
    for name, expected in asdict(trace()).items():
        assert np.array_equal(getattr(store.trace(record(PAIRS[0])), name), expected)
    assert store.trace(record(PAIRS[1])) is None
    (video,) = (tmp_path / "traces").glob("*.mp4")
    video.write_bytes(video.read_bytes()[:100])
    with pytest.raises(ValueError, match=video.name):
        store.trace(record(PAIRS[0]))


def test_full_disk_loses_nothing(tmp_path):
    store = EpisodeStore(tmp_path)
    for pair in PAIRS[:2]:
        store.append(record(pair))
    path = only_file(tmp_path)
    before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, old[1]))  # room for a part of the next line
    try:
        with pytest.raises(OSError, match="the 2 episodes before it are safe") as caught:
            store.append(record(PAIRS[2]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    store.append(record(PAIRS[2]))
    assert [r.pair for r in EpisodeStore(tmp_path).records()] == PAIRS[:3]


def test_killed_writer_loses_no_finished_episode(tmp_path):
    script = """
        import sys
        from tests_record import record
        from worldsim.store import EpisodeStore
        store = EpisodeStore(sys.argv[1])
        for k in range(10**6):
            store.append(record((k, k)))
            print(k, flush=True)
    """
    helper = tmp_path / "tests_record.py"
    helper.write_text(open(__file__).read().replace("def test_", "def _"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    arguments = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "store")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout
        for _ in range(20):
            last = process.stdout.readline()
        time.sleep(0.05)
        process.kill()
        reported = [last, *process.stdout.read().split("\n")]
    finished = max(int(line) for line in reported if line.strip().isdigit())
    assert {r.seed for r in EpisodeStore(tmp_path / "store").records()} >= set(range(finished + 1))


def test_parquet_holds_every_field(tmp_path):
    records = [record(PAIRS[0]), record(PAIRS[1], success=False)]
    write_parquet(records, tmp_path / "episodes.parquet")
    rows = pyarrow.parquet.read_table(tmp_path / "episodes.parquet").to_pylist()
    assert [row["success"] for row in rows] == [True, False]
    assert rows[0]["key"] == CELL.key(PAIRS[0])
    assert rows[0]["final_reach"] == pytest.approx(1 / 3)
    named = set(asdict(records[0])) - {"final_terms", "mean_terms"}
    assert named | {"key"} | {f"{kind}_{name}" for kind in ("final", "mean") for name in REWARD_TERMS} == set(rows[0])
