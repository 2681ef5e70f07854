"""The imagined Bridge as a TorchRL env whose whole state is in the tensordict.

    env = TorchRLBridgeEnv(WorldModelBridgeVectorEnv(64, task="reach_target", observation="latents"))
    env.rollout(50, policy, break_when_any_done=False)

A step reads everything from the tensordict, so a planner may branch from any state (`any_batch=True`). The state
("state", ...) has about 1 MB a row; leave it out of what you store: `td.exclude("state", ("next", "state"))`. For the
twin take TorchRL's own `GymWrapper` round `MujocoBridgeVectorEnv(..., autoreset_mode="Disabled")`.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.arguments import checked_actions, checked_initial_states
from envs.judging import judge
from envs.spaces import AGENT_POS_HIGH, AGENT_POS_LOW
from envs.world_model_bridge import WorldModelBridgeVectorEnv
from wfm_core.data.actions import ACTION_DIM
from worldsim.state import SimState

try:
    from tensordict import TensorDict, TensorDictBase
    from torchrl.data import Binary, Bounded, Composite, Unbounded
    from torchrl.envs import EnvBase
except ImportError as error:
    raise ImportError("envs.torchrl_env needs torchrl: pip install 'worldsim[torchrl]'") from error

_JUDGED = {"held": torch.int64, "potential": torch.float64}  # what the judge remembers of a row
_FLAGS = ("done", "terminated", "truncated")


class TorchRLBridgeEnv(EnvBase):
    """B imagined rows, judged as in `WorldModelBridgeVectorEnv`; rows that end are reset by who rolls out.

    Keys: "pixels" (B, H, W, 3) uint8 or "latents" (B, h, w, C) float32, as `env` observes; "agent_pos" (B, 7); "action"
    (B, 7) in [-1, 1], clipped beyond; "reward" and "uncertainty" (B, 1) float32; "done", "terminated", "truncated" and
    "is_success" (B, 1) bool; and "state". `reset(initial_state=...)` takes an int or B of them.
    """

    batch_locked = False

    def __init__(self, env: WorldModelBridgeVectorEnv, *, any_batch: bool = False, seed: int = 0) -> None:
        """Take contexts, task, rules and simulator of `env`, whose own rows are not touched.

        Args:
            env: how many rows there are, and what they imagine.
            any_batch: have no batch size, but take tensordicts of any; planners ask for that.
            seed: of initial states and of the rows' seeds.
        """
        super().__init__(device=env.sim.device, batch_size=[] if any_batch else [env.num_envs])
        self.env = env
        self._rng = np.random.default_rng(seed)
        rows = self.batch_size
        one = self._begun(np.zeros(1, np.int64), np.zeros(1, np.int64))
        state = {name: Unbounded((*rows, *value.shape[1:]), dtype=value.dtype) for name, value in one.items()}
        model = env.sim.world_model
        if env.observes_pixels:
            seen: dict[str, Any] = {"pixels": Bounded(0, 255, (*rows, *model.frame_shape), dtype=torch.uint8)}
        else:
            seen = {"latents": Unbounded((*rows, *model.latent_shape))}
        self._low, self._high = (torch.from_numpy(each).to(env.sim.device) for each in (AGENT_POS_LOW, AGENT_POS_HIGH))
        seen |= {
            "agent_pos": Bounded(self._low.expand(*rows, -1), self._high.expand(*rows, -1)),
            "is_success": Binary(1, (*rows, 1), dtype=torch.bool),
            "uncertainty": Unbounded((*rows, 1)),
        }
        self.observation_spec = Composite(**seen, state=Composite(state, shape=rows), shape=rows)
        self.state_spec = Composite(state=Composite(state, shape=rows).clone(), shape=rows)
        self.action_spec = Bounded(-1.0, 1.0, (*rows, ACTION_DIM))
        self.reward_spec = Unbounded((*rows, 1))
        flags = {name: Binary(1, (*rows, 1), dtype=torch.bool) for name in _FLAGS}
        self.full_done_spec = Composite(flags, shape=rows)
        self.to(env.sim.device)

    def _reset(self, tensordict: TensorDictBase | None = None, *, initial_state: Any = None, **_: Any) -> TensorDict:
        batch = self.batch_size if tensordict is None else tensordict.batch_size
        mask = np.ones(math.prod(batch), bool)
        if tensordict is not None and "_reset" in tensordict.keys():
            mask = tensordict["_reset"].reshape(-1).cpu().numpy()
        count = self.env.num_initial_states
        chosen = checked_initial_states(initial_state, mask, count)
        drawn, seeds = self._rng.integers(count, size=len(mask)), self._rng.integers(2**31, size=len(mask))
        new = self._begun((drawn if chosen is None else chosen)[mask], seeds[mask])
        if not mask.all():  # TorchRL takes the others' rows from what it has, whatever stands here
            row = torch.from_numpy(np.where(mask, mask.cumsum() - 1, 0)).to(self.env.sim.device)
            new = {name: value[row] for name, value in new.items()}
        nothing = np.zeros(len(mask), bool)
        out = self._observed(new) | self._column("is_success", nothing)
        out |= self._column("uncertainty", nothing.astype(np.float32))
        for name in _FLAGS:
            out |= self._column(name, nothing)
        return TensorDict(out, [len(mask)], device=self.device).reshape(batch)

    @torch.no_grad()
    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        batch = tensordict.batch_size
        rows = tensordict.reshape(-1)
        tensors: dict[str, Tensor] = rows["state"].to_dict()
        held, potential = (tensors.pop(name).cpu().numpy() for name in _JUDGED)
        actions, _ = checked_actions(rows["action"].cpu().numpy(), np.ones(len(rows), bool))
        state, step = self.env.sim.step(SimState.from_tensors(tensors), torch.from_numpy(actions))
        result = self.env.result(step)
        found = judge(result, state.elapsed.cpu().numpy(), held, potential, self.env.rules)
        judged = {name: torch.from_numpy(getattr(found, name)).to(self.env.sim.device) for name in _JUDGED}
        out = self._observed(state.as_tensors() | judged) | self._column("is_success", found.solved)
        out |= self._column("uncertainty", result.uncertainty.astype(np.float32))
        out |= self._column("reward", found.reward.astype(np.float32))
        ended = (found.terminated | found.truncated, found.terminated, found.truncated)
        for name, flag in zip(_FLAGS, ended, strict=True):
            out |= self._column(name, flag)
        return TensorDict(out, [len(rows)], device=self.device).reshape(batch)

    def _set_seed(self, seed: int | None) -> None:
        self._rng = np.random.default_rng(seed)

    def _begun(self, initial_states: np.ndarray, seeds: np.ndarray) -> dict[str, Tensor]:
        state = self.env.start(initial_states, seeds)
        unjudged = {
            name: torch.zeros(state.num_rows, dtype=dtype, device=self.env.sim.device)
            for name, dtype in _JUDGED.items()
        }
        return state.as_tensors() | unjudged

    def _column(self, name: str, value: np.ndarray) -> dict[str, Tensor]:
        return {name: torch.from_numpy(value)[:, None].to(self.env.sim.device)}

    @torch.no_grad()
    def _observed(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """What is seen of a state, and the state itself."""
        state = SimState.from_tensors({name: value for name, value in tensors.items() if name not in _JUDGED})
        if self.env.observes_pixels:
            seen = {"pixels": self.env.sim.decode(state.latents, state.reference)}
        else:
            seen = {"latents": state.latents.float()}
        return seen | {"agent_pos": state.agent_pos.float().clamp(self._low, self._high), "state": tensors}
