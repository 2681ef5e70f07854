import math

import numpy as np
import pytest

from tasks.task import REWARD_TERMS
from worldsim.evaluate import Cell, evaluate

CELL = Cell("p", "policy-hash", "twin", "world-hash", "push_cube")
PAIRS = [(k % 24, 100 + k) for k in range(11)]


class CountdownEnv:
    """Runs for 2 + seed % 5 steps; succeeds from an even initial state if the first action components were positive."""

    def __init__(self, num_envs, uncertainty=0.25):
        self.num_envs, self.uncertainty = num_envs, uncertainty
        self.seed, self.state, self.step_index, self.ended, self.failed = (np.zeros(num_envs, int) for _ in range(5))
        self.log = []  # (initial state, seed) of every episode begun

    def reset(self, *, seed=None, options=None):
        mask = options["reset_mask"]
        for row in np.flatnonzero(mask):
            self.seed[row], self.state[row] = seed[row], options["initial_state"][row]
            self.step_index[row] = self.ended[row] = self.failed[row] = 0
            self.log.append((self.state[row], self.seed[row]))
        return self._obs(), {}

    def step(self, actions):
        assert not self.ended.any(), "a finished row must be reset before the next step"
        self.step_index += 1
        self.failed |= actions[:, 0] < 0
        self.ended[:] = self.step_index >= 2 + self.seed % 5
        success = self.ended.astype(bool) & (self.state % 2 == 0) & (self.failed == 0)
        reason = np.where(success, "success", np.where(self.ended, "horizon", ""))
        info = {"is_success": success, "uncertainty": np.full(self.num_envs, self.uncertainty), "end_reason": reason}
        info |= {f"reward.{name}": self.step_index * 0.1 for name in REWARD_TERMS}
        return self._obs(), self.step_index * 1.0, success, self.ended.astype(bool) & ~success, info

    def _obs(self):
        pixels = np.zeros((self.num_envs, 2, 2, 3), np.uint8) + (self.seed * 10 + self.step_index)[:, None, None, None]
        return {
            "pixels": pixels.astype(np.uint8),
            "agent_pos": np.tile(self.step_index[:, None], (1, 7)).astype(np.float32),
        }


class SeededPolicy:
    """Acts on its row's seed and step only; positive in the first component unless the seed is a multiple of 4."""

    def reset(self, num_envs, *, instruction, seeds, mask=None):
        assert instruction == "push it"
        if mask is None:
            self.generators = [None] * num_envs
            self.seeds = [None] * num_envs
            mask = np.ones(num_envs, bool)
        for row in np.flatnonzero(mask):
            self.generators[row], self.seeds[row] = np.random.default_rng(seeds[row]), seeds[row]

    def act(self, obs):
        actions = np.stack([rng.uniform(0, 1, 7) for rng in self.generators]).astype(np.float32)
        actions[:, 0] = [-1 if seed % 4 == 0 else 1 for seed in self.seeds]
        return actions


def run(num_envs, pairs=PAIRS, **kwargs):
    env = CountdownEnv(num_envs)
    return evaluate(SeededPolicy(), env, pairs, CELL, instruction="push it", **kwargs), env


def outcome(record):
    return (*record.pair, record.success, record.length, record.episode_return, record.end_reason, record.mean_terms)


@pytest.mark.parametrize("num_envs", [1, 2, 4, 11, 16])
def test_every_pair_once_in_order_whatever_the_batch(num_envs):
    heard = []
    records, _ = run(num_envs, on_record=lambda record, trace: heard.append(record))
    assert [record.pair for record in records] == PAIRS
    assert [outcome(r) for r in records] == [outcome(r) for r in run(1)[0]]
    assert sorted(map(outcome, heard), key=str) == sorted(map(outcome, records), key=str)


def test_records_say_what_happened():
    for record in run(3)[0]:
        length = 2 + record.seed % 5
        assert record.length == length
        assert record.success == (record.initial_state % 2 == 0 and record.seed % 4 != 0)
        assert record.end_reason == ("success" if record.success else "horizon")
        assert record.episode_return == length * (length + 1) / 2
        assert record.final_terms == pytest.approx(dict.fromkeys(REWARD_TERMS, 0.1 * length))
        assert record.mean_terms == pytest.approx(dict.fromkeys(REWARD_TERMS, 0.1 * (length + 1) / 2))
        assert record.max_uncertainty == 0.25
        assert record.wall_time > 0
        assert (record.policy, record.policy_hash, record.task) == ("p", "policy-hash", "push_cube")


def test_short_episodes_are_not_favoured():
    # Successes end after 2 steps, failures after 6: with many rows the first to finish are all successes.
    class AlwaysPositive(SeededPolicy):
        def act(self, obs):
            return np.ones((len(self.seeds), 7), np.float32)

    pairs = [(k, 1000 + 10 * k + (0 if k % 2 == 0 else 4)) for k in range(8)]
    records = evaluate(AlwaysPositive(), CountdownEnv(4), pairs, CELL, instruction="push it")
    assert np.mean([record.success for record in records]) == 0.5


def test_no_episode_is_begun_twice_while_others_wait():
    _, env = run(4)
    first = list(dict.fromkeys(env.log))
    assert first == PAIRS
    assert env.log[: len(PAIRS)] == PAIRS  # repeats only fill idle rows, after the last pair has begun


def test_trace_holds_the_episode():
    traces = {}
    records, _ = run(3, traced={PAIRS[2], PAIRS[9]}, on_record=lambda r, trace: traces.update({r.pair: trace}))
    assert {pair for pair, trace in traces.items() if trace} == {PAIRS[2], PAIRS[9]}
    trace, record = traces[PAIRS[9]], records[9]
    assert trace.frames.shape == (record.length + 1, 2, 2, 3)
    assert trace.frames[:, 0, 0, 0].tolist() == [(record.seed * 10 + t) % 256 for t in range(record.length + 1)]
    assert trace.agent_pos[:, 0].tolist() == list(range(record.length + 1))
    assert trace.actions.shape == (record.length, 7)
    assert trace.actions[0, 0] == np.float32(0.05)  # +1 is 5 cm per step


def test_nan_uncertainty_is_recorded_as_infinite():
    records = evaluate(SeededPolicy(), CountdownEnv(2, math.nan), PAIRS[:3], CELL, instruction="push it")
    assert all(record.max_uncertainty == math.inf for record in records)


def test_key_depends_on_contents_not_names():
    key = CELL.key((1, 2))
    assert Cell("renamed", "policy-hash", "other", "world-hash", "push_cube").key((1, 2)) == key
    others = [
        Cell("p", "x", "twin", "world-hash", "push_cube").key((1, 2)),
        Cell("p", "policy-hash", "twin", "x", "push_cube").key((1, 2)),
        Cell("p", "policy-hash", "twin", "world-hash", "x").key((1, 2)),
        Cell("p", "policy-hash", "twin", "world-hash", "push_cube", '{"horizon": 9}').key((1, 2)),
        CELL.key((2, 2)),
        CELL.key((1, 3)),
    ]
    assert len({key, *others}) == 7
    assert run(1)[0][0].key(PAIRS[0]) == CELL.key(PAIRS[0])


def test_no_pairs_need_no_env():
    assert evaluate(SeededPolicy(), CountdownEnv(2), [], CELL, instruction="push it") == []


def test_repeated_pairs_are_refused():
    with pytest.raises(ValueError, match="must occur once, got 1 repeats"):
        run(2, pairs=[(0, 1), (0, 1)])


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((2, 6)), r"must have shape \(2, 7\), got \(2, 6\)"),
        (np.full((2, 7), np.nan), r"'p' .* must be finite"),
    ],
)
def test_bad_actions_name_the_policy(actions, message):
    class Broken(SeededPolicy):
        def act(self, obs):
            return actions

    with pytest.raises(ValueError, match=message):
        evaluate(Broken(), CountdownEnv(2), PAIRS, CELL, instruction="push it")


def test_the_projects_env_gives_the_same_records_in_any_batch():
    from envs.world_model_bridge import WorldModelBridgeVectorEnv
    from worldsim.probes import RandomPolicy

    pairs = [(k, k) for k in range(5)]
    outcomes = []
    for num_envs in (1, 3):
        env = WorldModelBridgeVectorEnv(
            num_envs, "scripted", "push_cube", autoreset_mode="Disabled", max_episode_steps=12, uncertainty_limit=0.3
        )
        records = evaluate(RandomPolicy(), env, pairs, CELL, instruction=env.task_description)
        outcomes.append(
            [(r.pair, r.length, r.end_reason, r.success, r.episode_return, r.max_uncertainty) for r in records]
        )
        env.close()
    assert [o[:4] for o in outcomes[0]] == [o[:4] for o in outcomes[1]]
    assert [o[4:] for o in outcomes[0]] == [pytest.approx(o[4:], rel=1e-5) for o in outcomes[1]]
