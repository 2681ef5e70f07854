import numpy as np
import pytest

from wfm_core.data.actions import to_physical
from worldsim.probes import PROBES, NoOpPolicy, RandomPolicy, ShuffledPolicy

OBS = {"pixels": np.zeros((3, 2, 2, 3), np.uint8), "agent_pos": np.zeros((3, 7), np.float32)}


class Counter:
    """Row i at step t acts with (100 i + t) / 1000 in every component."""

    def reset(self, num_envs, *, instruction, seeds, mask=None):
        mask = np.ones(num_envs, bool) if mask is None else mask
        self.steps = np.where(mask, 0, getattr(self, "steps", np.zeros(num_envs, int)))

    def act(self, obs):
        self.steps += 1
        return np.tile(((100 * np.arange(len(self.steps)) + self.steps) / 1000)[:, None], (1, 7)).astype(np.float32)


def roll(policy, num_steps, seeds=(1, 2, 3), mask=None):
    policy.reset(3, instruction="x", seeds=list(seeds), mask=mask)
    return np.stack([policy.act(OBS) for _ in range(num_steps)])


def test_no_op_keeps_the_pose_and_the_gripper_open():
    physical = to_physical(roll(NoOpPolicy(), 2))
    assert np.allclose(physical[..., :6], 0, atol=1e-7)
    assert np.allclose(physical[..., 6], 1)


@pytest.mark.parametrize("make", [RandomPolicy, lambda: ShuffledPolicy(Counter())])
def test_rows_depend_on_their_seed_only_and_restart_alone(make):
    policy = make()
    whole = roll(policy, 6)
    assert whole.shape == (6, 3, 7)
    assert np.abs(whole).max() <= 1
    assert not np.array_equal(whole[:, 0], whole[:, 1])
    mixed = make()
    roll(mixed, 4, seeds=(9, 2, 9))
    policy.reset(3, instruction="x", seeds=[1, 2, 3])
    [policy.act(OBS) for _ in range(4)]
    restarted = roll(mixed, 2, seeds=(1, 0, 3), mask=np.array([True, False, True]))
    assert np.array_equal(restarted[:, 0], whole[:2, 0])
    assert np.array_equal(restarted[:, 2], whole[:2, 2])
    assert np.array_equal(restarted[:, 1], whole[4:, 1])


def test_shuffled_emits_the_policys_own_actions_out_of_order():
    steps = np.round(1000 * roll(ShuffledPolicy(Counter(), pool_size=5), 60)[:, 0, 0]).astype(int)
    assert (steps <= np.arange(1, 61)).all()  # only actions that the policy has taken by then
    assert (np.diff(steps) < 0).sum() > 10
    full = steps[4:]
    assert len(set(full)) == len(full)  # once the pool is full an action leaves it when drawn


def test_shuffled_needs_something_to_shuffle():
    with pytest.raises(ValueError, match="at least 2"):
        ShuffledPolicy(Counter(), pool_size=1)


def test_every_probe_is_a_policy():
    assert set(PROBES) == {"no-op", "random", "shuffled"}
    for make in PROBES.values():
        assert roll(make(Counter()), 2).dtype == np.float32
