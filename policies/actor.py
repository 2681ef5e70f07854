"""What policies that predict action chunks have in common, whatever they see with: instruction, pose, waypoint, chunk.

From what it sees a network predicts where the gripper will be when it next opens or closes (the "waypoint", known in
hindsight in demonstrations), and acts on the difference between waypoint and gripper. The waypoint loss is what teaches
it to look at objects with few demonstrations.
"""

import abc
import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from policies.chunking import ChunkedPolicy
from wfm_core.checkpoint import build_config, load_weights, read_config, save_weights, write_config
from wfm_core.data.actions import ACTION_DIM, AGENT_POS_DIM
from worldsim.protocols import Obs

WAYPOINT_DIM = 4
"""A waypoint is agent_pos' x, y, z and yaw at the next gripper event."""

WAYPOINT_OF_AGENT_POS = (0, 1, 2, 5)
"""Where `agent_pos` holds the entries of a waypoint."""


@dataclass
class ActorConfig:
    """Sizes that do not depend on what a network sees with, and how its chunks are executed.

    Attributes:
        instructions: every instruction the policy was trained on; the position in the list is the conditioning id.
        chunk_len: actions predicted from one frame.
        num_executed: actions executed before predicting again (1 with ensembling).
        ensemble_decay: temporal ensembling, see `ChunkedPolicy`; None turns it off.
        num_keypoints: places in the frame that are looked at.
        hidden_dim: width of the two MLPs.
        instruction_dim: width of the instruction embedding.
        agent_pos_mean, agent_pos_std: (7,) normalisation of `agent_pos`, from the training data.

    Raises:
        ValueError: no instruction, or more actions executed than a chunk has.
    """

    instructions: list[str]
    chunk_len: int = 6
    num_executed: int = 3
    ensemble_decay: float | None = None
    num_keypoints: int = 32
    hidden_dim: int = 256
    instruction_dim: int = 32
    agent_pos_mean: list[float] = field(default_factory=lambda: [0.3, 0.0, 0.15, 0.0, 0.0, 0.0, 0.5])
    agent_pos_std: list[float] = field(default_factory=lambda: [0.08, 0.1, 0.08, 0.2, 0.2, 0.5, 0.5])

    def __post_init__(self) -> None:
        if not self.instructions:
            raise ValueError("instructions must name at least one instruction, got []")
        if not 1 <= self.num_executed <= self.chunk_len:
            raise ValueError(f"num_executed must be in 1..{self.chunk_len} (chunk_len), got {self.num_executed}")


class ActorNetwork[Config: ActorConfig](nn.Module, abc.ABC):
    """A picture, proprioception and instruction id to an action chunk and a waypoint; subclasses bring the vision.

    Attributes:
        kind: in a checkpoint's config.json.
        sees: the entry of an observation that is the picture.
        config: sizes.
    """

    kind: ClassVar[str]
    sees: ClassVar[str]
    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, seen_dim: int) -> None:
        """Make the heads of a network that gives `seen_dim` numbers for a picture."""
        super().__init__()
        self.config = config
        self.instruction = nn.Embedding(len(config.instructions), config.instruction_dim)
        self.known_dim = known_dim = seen_dim + AGENT_POS_DIM + config.instruction_dim
        self._comparable = [seen_dim + at for at in WAYPOINT_OF_AGENT_POS]  # where `known` has what a waypoint has
        self.waypoint_head = mlp(known_dim, config.hidden_dim, WAYPOINT_DIM)
        self.action_head = mlp(known_dim + WAYPOINT_DIM, config.hidden_dim, config.chunk_len * ACTION_DIM)
        self.register_buffer("mean", torch.tensor(config.agent_pos_mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.agent_pos_std), persistent=False)

    def look(self, picture: Tensor) -> Tensor:
        """Map pictures (B, ...) to what the trunk makes of them (B, ...); a network without one returns them."""
        return picture

    @abc.abstractmethod
    def see(self, looked: Tensor, embedding: Tensor) -> Tensor:
        """Read what `look` gave with the embedded instruction (B, E) in mind: (B, seen_dim) float32."""

    @abc.abstractmethod
    def picture(self, obs: Obs) -> Tensor:
        """Return what `look` takes of an observation of B rows.

        Raises:
            ValueError: it has another size than the network's.
        """

    def forward(self, picture: Tensor, agent_pos: Tensor, instruction_id: Tensor) -> tuple[Tensor, Tensor]:
        """Predict actions.

        Args:
            picture: (B, ...) as `picture` gives it.
            agent_pos: (B, 7) float32, m and rad.
            instruction_id: (B,) int64 index into `config.instructions`.

        Returns:
            The chunk (B, chunk_len, 7), normalised actions but for the gripper, which is the logit of "open", and
            the waypoint (B, 4) in units of the standard deviations of `agent_pos`.
        """
        return self.decide(self.know(self.look(picture), agent_pos, instruction_id))

    def know(self, looked: Tensor, agent_pos: Tensor, instruction_id: Tensor) -> Tensor:
        """Return (B, known_dim) all that actions are decided upon, of what `look` gave and what `forward` takes."""
        embedding = self.instruction(instruction_id)  # (B, E)
        state = (agent_pos - self.mean) / self.std  # (B, 7)
        return torch.cat([self.see(looked, embedding), state, embedding], dim=-1)

    def decide(self, known: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `forward` does, of what `know` gave."""
        waypoint = self.waypoint_head(known)  # (B, 4)
        offset = waypoint - known[:, self._comparable]
        actions = self.action_head(torch.cat([known, offset], dim=-1))
        return rearrange(actions, "b (t a) -> b t a", a=ACTION_DIM), waypoint

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` (float16); each appears whole or not at all."""
        save_weights(folder, "model", self.state_dict())
        write_config(folder, {"kind": self.kind, **asdict(self.config)})


class ActorPredictor:
    """A trained network as a `ChunkPredictor`: no gradients, the gripper logit turned into open (1) or closed (-1)."""

    def __init__(self, network: ActorNetwork) -> None:
        self.network = network.eval()
        self.chunk_len = network.config.chunk_len

    @torch.no_grad()
    def predict(self, obs: Obs, instruction: str) -> np.ndarray:
        """Return (B, chunk_len, 7) float32 in [-1, 1].

        Raises:
            ValueError: unknown instruction, or a picture of another size than the network's.
        """
        agent_pos = torch.from_numpy(np.asarray(obs["agent_pos"], np.float32))
        ids = torch.full((len(agent_pos),), instruction_id(self.network.config, instruction))
        actions, _ = self.network(self.network.picture(obs), agent_pos, ids)
        actions[..., -1] = torch.where(actions[..., -1] > 0, 1.0, -1.0)
        return actions.clamp(-1, 1).numpy()


def chunked(network: ActorNetwork) -> ChunkedPolicy:
    """Return a network as a policy."""
    return ChunkedPolicy(ActorPredictor(network), network.config.num_executed, network.config.ensemble_decay)


def load_actor[Network: ActorNetwork, Config: ActorConfig](
    network: Callable[[Config], Network], config: type[Config], folder: Path
) -> Network:
    """Load a folder written by `ActorNetwork.save`.

    Raises:
        ValueError: a file is missing or damaged, or weights and configuration disagree.
    """
    return load_weights(network(build_config(config, read_config(folder), folder)), folder, "model")


def instruction_id(config: ActorConfig, instruction: str) -> int:
    """Return the instruction's position in `config.instructions`.

    Raises:
        ValueError: the policy was not trained on it; the message names the nearest one.
    """
    if instruction in config.instructions:
        return config.instructions.index(instruction)
    nearest = difflib.get_close_matches(instruction, config.instructions, n=1, cutoff=0.0)[0]
    raise ValueError(f"the policy must know the instruction, got {instruction!r}; nearest known: {nearest!r}")


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.GELU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.GELU(),
        nn.Linear(hidden_dim, out_dim),
    )
