import numpy as np
import torch
from torch import nn

from policies.actor import ActorConfig, ActorNetwork
from policies.imagining import Decisions, Episodes
from policies.self_imitation import Successes, in_hindsight


class Blind(ActorNetwork[ActorConfig]):
    kind, sees = "blind", "agent_pos"

    def __init__(self) -> None:
        super().__init__(ActorConfig(["go"], chunk_len=3, num_executed=2, hidden_dim=4, instruction_dim=2), seen_dim=1)
        self.trunk = nn.Linear(1, 1)

    def look(self, picture):
        return self.trunk(picture)

    def see(self, looked, embedding):
        return looked

    def picture(self, obs):
        return torch.from_numpy(obs["agent_pos"][:, :1])


def episodes() -> Episodes:
    """Three: a success that closes its hand at its fourth action, one that was cut off, and a failure."""
    actions = np.zeros((5, 7), np.float32)
    actions[:, 0], actions[:, 6] = np.arange(1, 6) / 10, [1, 1, 1, -1, -1]
    pose = np.zeros((6, 7), np.float32)
    pose[:, 0] = np.arange(6)
    success, ended = np.array([True, True, False]), np.array([True, False, True])
    blank = np.zeros(3)
    return Episodes(success, ended, blank, blank, blank, blank, [actions] * 3, [pose] * 3)


def decisions() -> Decisions:
    n = 5
    blank = {name: torch.zeros(n) for name in ("log_prob", "executed", "reward", "value", "next_value", "next")}
    return Decisions(
        picture=torch.arange(n)[:, None].float(), agent_pos=torch.arange(n * 7).reshape(n, 7).float(),
        instruction_id=torch.zeros(n, dtype=torch.int64), actions=torch.zeros(n, 2, 7),
        episode=torch.tensor([0, 1, 0, 2, 0]), step=torch.tensor([0, 0, 2, 0, 4]), **blank,
    )  # fmt: skip


def test_hindsight_takes_what_succeeded_and_says_where_the_hand_closed():
    found = in_hindsight(decisions(), episodes(), chunk_len=3)
    assert found["picture"][:, 0].tolist() == [0, 2, 4]
    assert found["agent_pos"][:, 0].tolist() == [0, 14, 28]
    assert found["waypoint"][:, 0].tolist() == [3, 3, 5]  # where the fourth action was begun; then the end
    assert found["actions"][..., 6].tolist() == [[1, 1, 1], [1, -1, -1], [-1, -1, -1]]
    np.testing.assert_allclose(found["actions"][..., 0], [[0.1, 0.2, 0.3], [0.3, 0.4, 0.5], [0.5, 0, 0]])


def test_successes_are_looked_at_once_and_kept_in_files(tmp_path):
    network = Blind()
    batch = in_hindsight(decisions(), episodes(), chunk_len=3)
    kept = Successes(tmp_path, network, "readout", 0)
    kept.add(0, batch)
    kept.add(1, {name: value[:0] for name, value in batch.items()})
    kept.add(2, {name: value[1:] for name, value in batch.items()})
    assert len(kept) == 5
    looked, drawn = kept.draw(200, torch.Generator().manual_seed(0))
    torch.testing.assert_close(looked, network.look(drawn["agent_pos"][:, :1] / 7))
    counts = torch.bincount((drawn["agent_pos"][:, 0] / 14).long())
    torch.testing.assert_close(counts, torch.tensor([40, 80, 80]), atol=15, rtol=0)
    again = Successes(tmp_path, network, "readout", 2)  # the third was written by a run that was killed after it
    assert len(again) == 3
    whole = Successes(tmp_path, network, "all", 3)
    assert whole.draw(8, torch.Generator().manual_seed(1))[0].shape == (8, 1)
    assert not whole.draw(8, torch.Generator())[0].requires_grad
