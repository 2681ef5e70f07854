"""Fake worlds and policies, importable by name also in worker processes."""

import json
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tasks.task import REWARD_TERMS
from worldsim.contest import Contest, World, episode_pairs, hold_contest
from worldsim.store import EpisodeStore

QUALITY = {"good": 0.9, "fair": 0.6, "poor": 0.2}
TASKS = {"push": "push it", "lift": "lift it"}


class FakePolicy:
    """Shows its quality in its first action component."""

    def __init__(self, quality):
        self.quality = quality

    def reset(self, num_envs, *, instruction, seeds, mask=None):
        assert instruction in TASKS.values()
        self.num_envs = num_envs

    def act(self, obs):
        return np.full((self.num_envs, 7), self.quality, np.float32)


def load_fake(source):
    if source == "broken":
        raise ValueError("no such weights")
    return FakePolicy(QUALITY[source])


class FakeEnv:
    """An episode of 3 to 6 steps succeeds with the probability that the first action component says.

    The imagined world flips one outcome in seven; the task "lift" halves the probability.
    """

    def __init__(self, world, task, num_envs):
        self.world, self.task, self.num_envs = world, task, num_envs
        self.seed, self.state, self.steps, self.ended = (np.zeros(num_envs, int) for _ in range(4))

    def reset(self, *, seed=None, options=None):
        for row in np.flatnonzero(options["reset_mask"]):
            self.seed[row], self.state[row] = seed[row], options["initial_state"][row]
            self.steps[row] = self.ended[row] = 0
        return self._obs(), {}

    def step(self, actions):
        assert not self.ended.any()
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0")))
        self.steps += 1
        self.ended[:] = self.steps >= 3 + self.seed % 4
        success = np.zeros(self.num_envs, bool)
        for row in np.flatnonzero(self.ended):
            rng = np.random.default_rng([self.seed[row], self.state[row], ord(self.task[0])])
            success[row] = rng.random() < actions[row, 0] * (0.5 if self.task == "lift" else 1)
            success[row] ^= self.world == "imagined" and rng.random() < 0.15
        reason = np.where(success, "success", np.where(self.ended, "horizon", ""))
        info = {"is_success": success, "uncertainty": np.zeros(self.num_envs), "end_reason": reason}
        info |= {f"reward.{name}": success.astype(float) for name in REWARD_TERMS}
        return self._obs(), success.astype(float), success, self.ended.astype(bool) & ~success, info

    def close(self):
        pass

    def _obs(self):
        pixels = np.zeros((self.num_envs, 16, 16, 3), np.uint8)
        pixels += (self.seed % 200 + self.steps).astype(np.uint8)[:, None, None, None]
        return {"pixels": pixels, "agent_pos": np.zeros((self.num_envs, 7), np.float32)}


@dataclass(frozen=True)
class MakeFake:
    world: str

    def __call__(self, task, num_envs):
        if self.world == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        return FakeEnv(self.world, task, num_envs)


@dataclass(frozen=True)
class MakeBroken:
    def __call__(self, task, num_envs):
        raise RuntimeError("no screen")


def contest(twin=True, **changes):
    worlds = {
        name: World(name, f"{name}-hash", dict.fromkeys(TASKS, "{}"), MakeFake(name)) for name in ("imagined", "twin")
    }
    start = Contest(
        policies={name: name for name in QUALITY},
        hashes={name: f"{name}-hash" for name in QUALITY},
        instructions=TASKS,
        pairs=episode_pairs(20, 24, seed=5),
        imagined=worlds["imagined"],
        twin=worlds["twin"] if twin else None,
        load_policy=load_fake,
        num_videos=2,
        num_probe_pairs=4,
    )
    return replace(start, **changes)


def judge(trace, instruction):
    return bool(trace.frames[-1].max() % 2)


class Silent:
    """Counts what a contest tells of its progress."""

    def __init__(self):
        self.stages, self.advanced = [], 0

    def begin(self, stage, total, finished):
        self.stages.append((stage, total, finished))

    def advance(self, where):
        self.advanced += 1

    def end(self):
        pass


def run_contest(out):
    """Hold the contest in `out`/store and write `out`/ranking.json."""
    with EpisodeStore(Path(out) / "store") as store:
        ranking, _ = hold_contest(contest(), store, Silent(), num_envs=4, num_workers=2, judge=judge)
    (Path(out) / "ranking.json").write_text(json.dumps(ranking))
