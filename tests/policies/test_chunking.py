import numpy as np
import pytest

from policies.chunking import ChunkedPolicy


class Counting:
    """Chunk k of a row says: prediction number k, step 0.01 * index; row identity comes in through agent_pos[0]."""

    chunk_len = 4

    def __init__(self):
        self.calls = []

    def predict(self, obs, instruction):
        rows = obs["agent_pos"][:, 0]
        self.calls.append(rows.tolist())
        chunk = np.zeros((len(rows), 4, 7), np.float32)
        chunk[:, :, 0] = obs["agent_pos"][:, 1:2]  # the time at which it was predicted
        chunk[:, :, 1] = 0.1 * np.arange(4)
        chunk[:, :, 2] = rows[:, None]
        return chunk


def obs(time, rows):
    agent_pos = np.zeros((len(rows), 7), np.float32)
    agent_pos[:, 0], agent_pos[:, 1] = rows, time
    return {"pixels": np.zeros((len(rows), 4, 4, 3), np.uint8), "agent_pos": agent_pos}


def test_executes_the_first_actions_of_each_chunk():
    predictor = Counting()
    policy = ChunkedPolicy(predictor, num_executed=2)
    policy.reset(2, instruction="go", seeds=[0, 1])
    actions = np.stack([policy.act(obs(0.1 * t, [0.5, 0.6])) for t in range(5)])
    np.testing.assert_allclose(actions[:, 0, 0], [0, 0, 0.2, 0.2, 0.4], atol=1e-6)
    np.testing.assert_allclose(actions[:, 0, 1], [0, 0.1, 0, 0.1, 0], atol=1e-6)
    np.testing.assert_allclose(actions[:, 1, 2], 0.6)
    assert len(predictor.calls) == 3


def test_a_masked_reset_replans_only_its_rows():
    predictor = Counting()
    policy = ChunkedPolicy(predictor, num_executed=3)
    policy.reset(2, instruction="go", seeds=[0, 1])
    policy.act(obs(0.0, [0.5, 0.6]))
    policy.reset(2, instruction="go", seeds=[0, 7], mask=np.array([False, True]))
    actions = policy.act(obs(0.1, [0.5, 0.6]))
    assert predictor.calls[-1] == pytest.approx([0.6])
    np.testing.assert_allclose(actions[:, 1], [0.1, 0.0], atol=1e-6)


def test_ensembling_weighs_the_oldest_prediction_most():
    policy = ChunkedPolicy(Counting(), num_executed=1, ensemble_decay=0.5)
    policy.reset(1, instruction="go", seeds=[0])
    actions = [policy.act(obs(0.1 * t, [0.0]))[0] for t in range(6)]
    weights = np.exp(-0.5 * np.arange(4))
    weights /= weights.sum()
    # at t = 5 the covering chunks were predicted at 2, 3, 4, 5 and are 3, 2, 1, 0 steps old
    assert actions[5][0] == pytest.approx(weights @ [0.2, 0.3, 0.4, 0.5], abs=1e-6)
    assert actions[5][1] == pytest.approx(weights @ [0.3, 0.2, 0.1, 0.0], abs=1e-6)
    two = np.exp(-0.5 * np.arange(2))
    assert actions[1][0] == pytest.approx(two @ [0.0, 0.1] / two.sum(), abs=1e-6)


def test_a_row_that_restarts_forgets_its_former_chunks():
    policy = ChunkedPolicy(Counting(), num_executed=1, ensemble_decay=0.5)
    policy.reset(2, instruction="go", seeds=[0, 1])
    for time in (0.1, 0.2):
        policy.act(obs(time, [0.0, 0.0]))
    policy.reset(2, instruction="go", seeds=[2, 1], mask=np.array([True, False]))
    action = policy.act(obs(0.9, [0.0, 0.0]))
    assert action[0, 0] == pytest.approx(0.9)
    assert action[1, 0] < 0.9


def test_actions_are_clipped_to_the_box():
    policy = ChunkedPolicy(Counting(), num_executed=1)
    policy.reset(1, instruction="go", seeds=[0])
    assert policy.act(obs(3.0, [-5.0]))[0, [0, 2]].tolist() == [1.0, -1.0]


@pytest.mark.parametrize("num_executed, decay", [(0, None), (5, None), (2, 0.1)])
def test_refuses_impossible_settings(num_executed, decay):
    with pytest.raises(ValueError, match=f"{num_executed}"):
        ChunkedPolicy(Counting(), num_executed, decay)


def test_refuses_misuse():
    policy = ChunkedPolicy(Counting(), 1)
    with pytest.raises(ValueError, match="reset must be called"):
        policy.act(obs(0, [0]))
    with pytest.raises(ValueError, match=r"one seed a row \(2\), got 1"):
        policy.reset(2, instruction="go", seeds=[0])
    policy.reset(2, instruction="go", seeds=[0, 1])
    with pytest.raises(ValueError, match="2 rows"):
        policy.act(obs(0, [0, 0, 0]))
    with pytest.raises(ValueError, match="'stop'"):
        policy.reset(2, instruction="stop", seeds=[0, 1], mask=np.array([True, False]))
    with pytest.raises(ValueError, match="mask"):
        policy.reset(2, instruction="go", seeds=[0, 1], mask=np.array([True]))
