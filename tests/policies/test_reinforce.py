import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import policies.policy_gradient
from envs.world_model_bridge import WorldModelBridgeVectorEnv
from policies.actor import ActorConfig, ActorNetwork
from policies.imagining import GRIPPER_SHARPNESS, Decisions, Episodes, Explorer, explore
from policies.policy_gradient import advantages, clipped_loss, divergence, group_advantages
from policies.reinforce import Arena, Probe, StopRule, reinforce
from policies.reinforce_config import TRAINED, ReinforceConfig
from tasks import TASKS
from wfm_core.models.scripted import ScriptedWorldModel
from worldsim.scripted_heads import ScriptedHeads
from worldsim.simulator import Calibration, WorldSim

TASK = TASKS["reach_target"]


class PoseNetwork(ActorNetwork[ActorConfig]):
    """Sees one number that means nothing: all there is to know is where the arm is."""

    kind, sees = "pose", "agent_pos"

    def __init__(self, **settings) -> None:
        torch.manual_seed(0)
        sizes = {"chunk_len": 2, "num_executed": 2, "hidden_dim": 32, "instruction_dim": 2}
        super().__init__(ActorConfig([TASK.instruction], **sizes | settings), seen_dim=1)
        self.trunk, self.eye = nn.Linear(7, 3), nn.Linear(3, 1)

    def look(self, picture):
        return self.trunk(picture)

    def see(self, looked, embedding):
        return self.eye(looked)

    def picture(self, obs):
        return torch.from_numpy(obs["agent_pos"])


class RightEnv:
    """Pays 1 + the step's number for going right with less than half speed; ends after `lengths[row]` steps."""

    def __init__(self, lengths, ends: str = "terminated") -> None:
        self.num_envs, self.lengths, self.ends = len(lengths), np.array(lengths), ends
        self.resets: list = []

    def reset(self, *, seed=None, options=None):
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        if mask.all():
            self.elapsed = np.zeros(self.num_envs, np.int64)
        self.elapsed[mask] = 0
        self.resets.append(mask.copy())
        return self._obs(), {"initial_state": (options or {}).get("initial_state", np.arange(self.num_envs))}

    def step(self, actions):
        self.elapsed += 1
        ended = self.elapsed >= self.lengths
        success = ended & (self.lengths < 5)
        no = np.zeros(self.num_envs, bool)
        info = {"is_success": success, "uncertainty": np.full(self.num_envs, 0.5)}
        flags = (ended, no) if self.ends == "terminated" else (no, ended)
        return self._obs(), self.elapsed + 1.0, *flags, info

    def _obs(self):
        agent_pos = np.zeros((self.num_envs, 7), np.float32)
        agent_pos[:, 0] = self.elapsed
        return {"agent_pos": agent_pos}

    def close(self):
        pass


def rolled(lengths, num_steps, ends="terminated", **more):
    explorer = Explorer(PoseNetwork(), 0.2)
    explorer.value_head[-1].bias.data.fill_(10.0)
    return explore(
        explorer, RightEnv(lengths, ends), TASK.instruction, num_steps, gamma=0.5, seeds=range(len(lengths)),
        generator=torch.Generator().manual_seed(0), **more,
    )  # fmt: skip


def test_what_became_of_each_decision_is_written_down():
    decisions, episodes = rolled([3, 8], num_steps=5)
    # Row 0: steps 1 2 | 3 end | 1 2 cut; row 1: 1 2 | 3 4 | 5 cut. In the order in which they were asked.
    assert decisions.executed.tolist() == [2, 2, 1, 2, 2, 1]
    assert decisions.reward.tolist() == [2 + 0.5 * 3, 2 + 0.5 * 3, 4, 4 + 0.5 * 5, 2 + 0.5 * 3, 6]
    assert decisions.next.tolist() == [2, 3, -1, 5, -1, -1]
    assert decisions.episode.tolist() == [0, 1, 0, 1, 2, 1]
    assert decisions.next_value.tolist() == [10, 10, 0, 10, 10, 10]  # nothing comes after a terminated episode
    assert decisions.agent_pos[:, 0].tolist() == [0, 0, 2, 2, 0, 4]
    assert episodes.success.tolist() == [True, False, False] and episodes.ended.tolist() == [True, False, False]
    assert episodes.length.tolist() == [3, 5, 2] and episodes.episode_return.tolist() == [9, 20, 5]
    assert episodes.uncertainty.tolist() == [0.5] * 3


def test_a_truncated_episode_is_expected_to_go_on():
    decisions, _ = rolled([3], num_steps=3, ends="truncated")
    assert decisions.next_value.tolist() == [10, 10]


def test_rows_of_a_group_wait_for_each_other():
    decisions, episodes = rolled([3, 6, 2, 6], num_steps=6, initial_states=np.array([4, 4, 1, 1]))
    assert episodes.length.tolist() == [3, 6, 2, 6] and episodes.ended.all()
    assert episodes.initial_state.tolist() == [4, 4, 1, 1]
    assert episodes.success.tolist() == [True, False, True, False]
    assert torch.bincount(decisions.episode).tolist() == [2, 3, 1, 3]


@torch.no_grad()
def test_what_was_drawn_has_the_density_it_is_said_to_have():
    explorer, generator = Explorer(PoseNetwork(), 0.3, persistence=0.6), torch.Generator().manual_seed(0)
    explorer.network.action_head[-1].bias.data[[6, 13]] = 0.2  # gripper, of both steps
    known = torch.zeros(1, explorer.network.known_dim).expand(4000, -1)
    before = explorer.displacements(None, 4000, generator)
    displaced = explorer.displacements(before, 4000, generator)
    correlation = (before * displaced).mean() / (before.std() * displaced.std())
    assert correlation == pytest.approx(0.6, abs=0.02) and displaced.std() == pytest.approx(0.3, rel=0.02)
    drawn = explorer.draw(known, displaced, generator)
    mean = explorer.network.decide(known[:1])[0][0]
    torch.testing.assert_close(drawn[..., :6], mean[:, :6] + displaced[:, None])
    chances = torch.sigmoid(GRIPPER_SHARPNESS * mean[:, 6])
    assert (drawn[..., 6] > 0).float().mean() == pytest.approx(chances.mean().item(), abs=0.02)
    here = torch.cat([mean[:, :6] + 0.3, torch.tensor([[1.0], [-1.0]])], dim=1)[None]
    density = explorer.log_prob(known[:1], here)[0]
    peak = -6 * (np.log(0.3 * np.sqrt(2 * np.pi)) + 0.5)
    first, second = chances.tolist()
    assert density.tolist() == pytest.approx([peak, np.log(first), np.log(1 - second)], rel=1e-4)


def some(rewards, next_index, values, next_values, executed) -> Decisions:
    n = len(rewards)
    return Decisions(
        picture=torch.zeros(n, 7), agent_pos=torch.zeros(n, 7), instruction_id=torch.zeros(n, dtype=torch.int64),
        actions=torch.zeros(n, 2, 7), log_prob=torch.zeros(n, 3), executed=torch.tensor(executed),
        reward=torch.tensor(rewards), value=torch.tensor(values), next_value=torch.tensor(next_values),
        next=torch.tensor(next_index), episode=torch.tensor([0, 0, 1][:n]), step=torch.zeros(n, dtype=torch.int64),
    )  # fmt: skip


def test_advantages_are_gaes():
    decisions = some([1.0, 2.0, 5.0], [1, -1, -1], [0.5, 1.0, 4.0], [1.0, 0.0, 3.0], [2, 1, 2])
    found, target = advantages(decisions, gamma=0.9, gae_lambda=0.5)
    last = 2.0 - 1.0
    first = 1.0 + 0.81 * 1.0 - 0.5 + 0.81 * 0.5 * last
    alone = 5.0 + 0.81 * 3.0 - 4.0
    assert found.tolist() == pytest.approx([first, last, alone])
    assert target.tolist() == pytest.approx([first + 0.5, last + 1.0, alone + 4.0])


def test_groups_that_are_all_alike_say_nothing():
    success = np.array([True, False, True, True, False, False])
    blank = np.zeros(6)
    episodes = Episodes(success, success | True, blank, blank, blank, blank, [], [])
    decisions = some([0.0] * 3, [-1] * 3, [0.0] * 3, [0.0] * 3, [2] * 3)
    decisions.episode = torch.tensor([0, 1, 2, 3, 4, 5])
    found, counts = group_advantages(decisions, episodes, 2)
    assert counts.tolist() == [True, True, False, False, False, False]
    assert found[:2].tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)])


@torch.no_grad()
def test_the_ratio_stops_to_count_beyond_its_clips_and_knows_what_was_executed():
    explorer, clips = Explorer(PoseNetwork(), 0.2), (0.1, 0.3)
    known = torch.zeros(2, explorer.network.known_dim)
    batch = some([0.0] * 2, [-1] * 2, [0.0] * 2, [0.0] * 2, [2, 1])
    batch.log_prob = explorer.log_prob(known, batch.actions).detach()
    batch.log_prob[1, 2] += 7.0  # was never executed
    same, told = clipped_loss(explorer, known, batch, torch.tensor([1.0, 3.0]), *clips)
    assert same.item() == pytest.approx(-2.0) and told["approx_kl"] == 0 and told["clipped"] == 0
    batch.log_prob[:, 0] -= torch.tensor([1.0, -1.0])  # the first is likelier now, the second less likely
    loss, told = clipped_loss(explorer, known, batch, torch.tensor([1.0, -3.0]), *clips)
    assert loss.item() == pytest.approx(-(1.3 - 3 * 0.9) / 2, rel=1e-5) and told["clipped"] == 1


@torch.no_grad()
def test_the_divergence_is_that_of_what_was_executed():
    explorer, start = Explorer(PoseNetwork(), 0.2), Explorer(PoseNetwork(), 0.2)
    known = torch.zeros(2, explorer.network.known_dim)
    start.network.action_head[-1].bias.data[:6] += 0.1  # first step of two, half a standard deviation in each of 6
    start.network.action_head[-1].bias.data[-1] += 2.0  # second step, the gripper
    batch = some([0.0] * 2, [-1] * 2, [0.0] * 2, [0.0] * 2, [1, 0])
    aims = explorer.aims(known), start.aims(known)
    assert divergence(explorer, *aims, batch).item() == pytest.approx(6 * 0.5**2 / 2 / 2)
    batch.executed[:] = 2
    open_now, open_then = (torch.sigmoid(each[0, 1, -1]).item() for each in aims)
    gripper = open_now * math.log(open_now / open_then)
    gripper += (1 - open_now) * math.log((1 - open_now) / (1 - open_then))
    assert divergence(explorer, *aims, batch).item() == pytest.approx(6 * 0.5**2 / 2 / 2 + gripper, rel=1e-4)
    sure = [torch.zeros(2, 2, 7) for _ in range(2)]
    sure[0][..., -1], sure[1][..., -1] = 200.0, -200.0  # float32 knows no probability between these and 1 or 0
    assert divergence(explorer, *sure, batch).item() == pytest.approx(2 * 200.0)


def arena(rows: int, tolerance: float = 0.1) -> Arena:
    heads = ScriptedHeads(tolerance=tolerance)
    sim = WorldSim(ScriptedWorldModel(), heads, calibration=Calibration())
    env = WorldModelBridgeVectorEnv(
        rows, sim, TASK.name, observation="latents", autoreset_mode="Disabled", reward="progress",
        max_episode_steps=16, uncertainty_limit=np.inf,
    )  # fmt: skip
    env.num_initial_states = 1  # or nobody would know where the target is
    return Arena(env, TASK.instruction, 1)


QUICK = {
    "objective": "ppo",
    "rollout_steps": 16, "learning_rate": 1e-3, "gamma": 0.9, "trained": "all", "action_std": 0.4, "batch_size": 64,
    "value_learning_rate": 1e-2, "value_warmup": 0, "persistence": 0.0, "imitation_steps": 20,
}  # fmt: skip


def told(run_dir, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (run_dir / "updates.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "settings",
    [{}, {"kl": 0.1}, {"objective": "group", "group_size": 16}, {"objective": "imitation", "persistence": 0.8}],
)
def test_it_learns(settings, tmp_path):
    called = []
    config = ReinforceConfig(num_updates=12, **QUICK | settings)
    reinforce(PoseNetwork(), [arena(32)], config, tmp_path, on_update=lambda done, row: called.append(done))
    success = told(tmp_path, "rollout_success")
    assert called == list(range(1, 13))
    assert success[0] < 0.75 and np.mean(success[-3:]) > success[0] + 0.2


@pytest.mark.parametrize("objective", ["ppo", "imitation"])
def test_a_killed_run_goes_on_as_it_would_have(objective, tmp_path):
    settings = QUICK | {"objective": objective}
    config = ReinforceConfig(num_updates=4, **settings)
    whole, parts = PoseNetwork(), PoseNetwork()
    reinforce(whole, [arena(8)], config, tmp_path / "whole")

    def killed(done, row):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reinforce(parts, [arena(8)], config, tmp_path / "parts", on_update=killed)
    again = PoseNetwork()
    found = reinforce(again, [arena(8)], config, tmp_path / "parts")
    assert found.updates == 4
    assert told(tmp_path / "parts", "loss") == told(tmp_path / "whole", "loss")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"other settings \(gamma=0.9, now 0.8\)"):
        changed = ReinforceConfig(**settings | {"gamma": 0.8})
        reinforce(PoseNetwork(), [arena(8)], changed, tmp_path / "parts")


def test_what_is_trained_is_what_is_asked_for(tmp_path):
    before, moved = PoseNetwork().state_dict(), {}
    for trained in TRAINED:
        network = PoseNetwork()
        config = ReinforceConfig(num_updates=1, **QUICK | {"trained": trained})
        reinforce(network, [arena(4)], config, tmp_path / trained)
        after = network.state_dict()
        moved[trained] = {name.split(".")[0] for name, value in after.items() if (value != before[name]).any()}
    heads, read = {"waypoint_head", "action_head"}, {"eye", "instruction"}
    assert moved == {"heads": heads, "readout": heads | read, "all": {*heads, *read, "trunk"}}
    with pytest.raises(ValueError, match="trained must be one of"):
        ReinforceConfig(trained="none")


@pytest.mark.parametrize("trained", TRAINED)
def test_it_is_kept_to_what_the_first_policy_would_do_as_that_one_sees(trained, tmp_path, monkeypatch):
    first, compared = Explorer(PoseNetwork(), QUICK["action_std"]), []
    real = policies.policy_gradient.divergence

    def spy(explorer, aims, start_aims, batch):
        look = first.network.look(batch.picture)
        compared.append((start_aims, first.aims(first.network.know(look, batch.agent_pos, batch.instruction_id))))
        return real(explorer, aims, start_aims, batch)

    monkeypatch.setattr(policies.policy_gradient, "divergence", spy)
    config = ReinforceConfig(num_updates=3, kl=0.1, **QUICK | {"trained": trained})
    reinforce(PoseNetwork(), [arena(4)], config, tmp_path)
    assert len(compared) >= 3
    for found, expected in compared:
        torch.testing.assert_close(found, expected)
    assert told(tmp_path, "divergence")[-1] > 0


@pytest.mark.parametrize("trained", ["readout", "all"])
def test_demonstrations_are_kept_in_mind(trained, tmp_path):
    asked = []

    def demonstrations(number):
        asked.append(number)
        pose = torch.randn(32, 7, generator=torch.Generator().manual_seed(number))
        wanted = torch.full((32, 2, 7), 0.7)
        told = {"agent_pos": pose, "instruction_id": torch.zeros(32, dtype=torch.int64), "waypoint": torch.zeros(32, 4)}
        return told | {"picture": pose, "actions": wanted}

    config = ReinforceConfig(num_updates=6, cloning=10.0, **QUICK | {"trained": trained})
    network = PoseNetwork()
    reinforce(network, [arena(4)], config, tmp_path, demonstrations=demonstrations)
    cloning = told(tmp_path, "cloning")
    assert cloning[-1] < 0.75 * cloning[0] and len(set(asked)) == len(asked)
    with pytest.raises(ValueError, match="cloning=10.0 needs demonstrations"):
        reinforce(network, [arena(4)], config, tmp_path / "none")


def test_rows_must_be_whole_groups(tmp_path):
    config = ReinforceConfig(**QUICK | {"objective": "group", "group_size": 4})
    with pytest.raises(ValueError, match="multiple of group_size=4, got 6"):
        reinforce(PoseNetwork(), [arena(6)], config, tmp_path)


def test_groups_without_any_success_change_nothing(tmp_path):
    network = PoseNetwork()
    config = ReinforceConfig(num_updates=1, **QUICK | {"objective": "group", "group_size": 4})
    reinforce(network, [arena(8, tolerance=1e-3)], config, tmp_path)
    assert told(tmp_path, "episodes") == [8] and told(tmp_path, "decisions") == [0]
    for name, value in PoseNetwork().state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=0, atol=0)


def test_it_stops_when_imagined_success_rises_with_uncertainty_or_the_gap():
    rule = StopRule(ReinforceConfig(patience=2, uncertainty_growth=1.5, gap_growth=0.15))
    assert [rule(Probe(s, u)) for s, u in ((0.3, 0.1), (0.2, 0.2), (0.5, 0.14), (0.5, 0.2))] == [""] * 4
    assert "uncertainty 0.3, at first 0.1" in rule(Probe(0.6, 0.3))
    rule = StopRule(ReinforceConfig(patience=1))
    assert rule(Probe(0.3, 0.1, 0.3)) == rule(Probe(0.6, 0.1, 0.5)) == ""
    assert "success 0.30, at first 0.00" in rule(Probe(0.9, 0.1, 0.6))


def test_probes_are_asked_and_kept(tmp_path):
    asked = []

    def probe(network, done):
        asked.append(done)
        return Probe(0.1 * len(asked), 0.1 * len(asked))

    config = ReinforceConfig(num_updates=9, probe_every=2, patience=2, **QUICK)
    found = reinforce(PoseNetwork(), [arena(2)], config, tmp_path, probe=probe)
    assert asked == [0, 2, 4] and found.updates == 4 and "uncertainty" in found.stopped
    assert [each.imagined for each in found.probes] == pytest.approx([0.1, 0.2, 0.3])
    again = reinforce(PoseNetwork(), [arena(2)], config, tmp_path, probe=probe)
    assert asked == [0, 2, 4] and again == found


def test_nothing_good_is_overwritten_by_what_is_not_a_number(tmp_path):
    network = PoseNetwork()
    reinforce(network, [arena(2)], ReinforceConfig(num_updates=1, **QUICK), tmp_path)
    kept = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(FloatingPointError, match=str(tmp_path)):
        config = ReinforceConfig(num_updates=2, **QUICK)
        reinforce(network, [arena(2)], config, tmp_path, probe=lambda network, done: _spoil(network))
    assert (tmp_path / "state.safetensors").read_bytes() == kept


def _spoil(network) -> Probe:
    network.action_head[-1].bias.data.fill_(torch.nan)
    return Probe(0.0, 0.0)
