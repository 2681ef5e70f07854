"""Behaviour cloning: a small convolutional network that predicts action chunks from one frame and an instruction.

The network finds keypoints (spatial softmax over conditioned feature maps), predicts from them where the gripper will
be when it next opens or closes (the "waypoint", known in hindsight in demonstrations), and acts on the difference
between waypoint and gripper. The waypoint loss is what teaches the keypoints to sit on objects with few demonstrations.
"""

import difflib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from policies.chunking import ChunkedPolicy
from wfm_core.checkpoint import build_config, load_weights, read_config, save_weights, write_config
from wfm_core.data.actions import ACTION_DIM, AGENT_POS_DIM
from worldsim.protocols import Obs

WAYPOINT_DIM = 4
"""A waypoint is agent_pos' x, y, z and yaw at the next gripper event."""

WAYPOINT_OF_AGENT_POS = (0, 1, 2, 5)
"""Where `agent_pos` holds the entries of a waypoint."""


@dataclass
class BCConfig:
    """Sizes of the network and how its chunks are executed.

    Attributes:
        instructions: every instruction the policy was trained on; the position in the list is the conditioning id.
        image_size: height and width of `pixels`.
        chunk_len: actions predicted from one frame.
        num_executed: actions executed before predicting again (1 with ensembling).
        ensemble_decay: temporal ensembling, see `ChunkedPolicy`; None turns it off.
        width: channels of the first convolution; later ones have twice as many.
        num_keypoints: feature maps turned into image coordinates.
        hidden_dim: width of the two MLPs.
        instruction_dim: width of the instruction embedding.
        agent_pos_mean, agent_pos_std: (7,) normalisation of `agent_pos`, from the training data.
    """

    instructions: list[str]
    image_size: int = 128
    chunk_len: int = 6
    num_executed: int = 3
    ensemble_decay: float | None = None
    width: int = 16
    num_keypoints: int = 32
    hidden_dim: int = 256
    instruction_dim: int = 32
    agent_pos_mean: list[float] = field(default_factory=lambda: [0.3, 0.0, 0.15, 0.0, 0.0, 0.0, 0.5])
    agent_pos_std: list[float] = field(default_factory=lambda: [0.08, 0.1, 0.08, 0.2, 0.2, 0.5, 0.5])


class BCNetwork(nn.Module):
    """Pixels, proprioception and instruction id to an action chunk and a waypoint.

    Raises:
        ValueError: the configuration has no instruction, an image size that is not a multiple of 4, or executes more
            actions than a chunk has.
    """

    mean: Tensor
    std: Tensor
    grid: Tensor

    def __init__(self, config: BCConfig) -> None:
        super().__init__()
        if not config.instructions:
            raise ValueError("BCConfig.instructions must name at least one instruction, got []")
        if config.image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, got {config.image_size}")
        if not 1 <= config.num_executed <= config.chunk_len:
            raise ValueError(f"num_executed must be in 1..{config.chunk_len} (chunk_len), got {config.num_executed}")
        self.config = config
        width, keypoints, hidden = config.width, config.num_keypoints, config.hidden_dim
        self.instruction = nn.Embedding(len(config.instructions), config.instruction_dim)
        self.stem = nn.Conv2d(3, width, 4, stride=2, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 2 * width)
        self.convs = nn.ModuleList(
            nn.Conv2d(2 * width, 2 * width, 3, padding=dilation, dilation=dilation) for dilation in (1, 2, 4)
        )
        self.queries = nn.Linear(config.instruction_dim, keypoints * 2 * width)
        self.log_sharpness = nn.Parameter(torch.zeros(keypoints, 1))
        seen_dim = 3 * keypoints + AGENT_POS_DIM + config.instruction_dim
        self.waypoint_head = _mlp(seen_dim, hidden, WAYPOINT_DIM)
        self.action_head = _mlp(seen_dim + WAYPOINT_DIM, hidden, config.chunk_len * ACTION_DIM)
        self.register_buffer("mean", torch.tensor(config.agent_pos_mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.agent_pos_std), persistent=False)
        grid = torch.linspace(-1, 1, config.image_size // 4)
        self.register_buffer("grid", grid, persistent=False)

    def forward(self, pixels: Tensor, agent_pos: Tensor, instruction_id: Tensor) -> tuple[Tensor, Tensor]:
        """Predict actions.

        Args:
            pixels: (B, H, W, 3) uint8.
            agent_pos: (B, 7) float32, m and rad.
            instruction_id: (B,) int64 index into `config.instructions`.

        Returns:
            The chunk (B, chunk_len, 7), normalised actions but for the gripper, which is the logit of "open", and
            the waypoint (B, 4) in units of the standard deviations of `agent_pos`.
        """
        embedding = self.instruction(instruction_id)  # (B, E)
        state = (agent_pos - self.mean) / self.std  # (B, 7)
        seen = torch.cat([self.keypoints(pixels, embedding), state, embedding], dim=-1)
        waypoint = self.waypoint_head(seen)  # (B, 4)
        offset = waypoint - state[:, list(WAYPOINT_OF_AGENT_POS)]
        actions = self.action_head(torch.cat([seen, offset], dim=-1))
        return rearrange(actions, "b (t a) -> b t a", a=ACTION_DIM), waypoint

    def keypoints(self, pixels: Tensor, embedding: Tensor) -> Tensor:
        """Return (B, 3 K) float32: x and y in [-1, 1] of each keypoint and the peak height of its softmax map."""
        x = rearrange(pixels, "b h w c -> b c h w").to(torch.float32) / 127.5 - 1  # channels last, as stored
        x = functional.relu(self.stem(x))
        x = functional.relu(self.norm(self.down(x)))  # (B, 2 width, H/4, W/4)
        for conv in self.convs:
            x = x + functional.relu(conv(x))
        queries = rearrange(self.queries(embedding), "b (k c) -> b k c", c=x.shape[1])
        heat = torch.bmm(queries, rearrange(x, "b c h w -> b c (h w)")).float()  # (B, K, H/4 W/4)
        heat = (heat * self.log_sharpness.exp()).softmax(dim=-1)
        heat = rearrange(heat, "b k (h w) -> b k h w", w=x.shape[-1])
        across, down = heat.sum(dim=2) @ self.grid, heat.sum(dim=3) @ self.grid
        return torch.cat([across, down, heat.amax(dim=(-2, -1))], dim=-1)


class BCPredictor:
    """A trained network as a `ChunkPredictor`: no gradients, the gripper logit turned into open (1) or closed (-1)."""

    def __init__(self, network: BCNetwork) -> None:
        self.network = network.eval()
        self.chunk_len = network.config.chunk_len

    @torch.no_grad()
    def predict(self, obs: Obs, instruction: str) -> np.ndarray:
        """Return (B, chunk_len, 7) float32 in [-1, 1].

        Raises:
            ValueError: unknown instruction, or pixels of another size than the network's.
        """
        config = self.network.config
        pixels = torch.from_numpy(np.ascontiguousarray(obs["pixels"]))
        if pixels.shape[1:] != (config.image_size, config.image_size, 3):
            raise ValueError(f"pixels must be (B, {config.image_size}, {config.image_size}, 3), got {pixels.shape}")
        agent_pos = torch.from_numpy(np.asarray(obs["agent_pos"], np.float32))
        ids = torch.full((len(pixels),), instruction_id(config, instruction))
        actions, _ = self.network(pixels, agent_pos, ids)
        actions[..., -1] = torch.where(actions[..., -1] > 0, 1.0, -1.0)
        return actions.clamp(-1, 1).numpy()


def instruction_id(config: BCConfig, instruction: str) -> int:
    """Return the instruction's position in `config.instructions`.

    Raises:
        ValueError: the policy was not trained on it; the message names the nearest one.
    """
    if instruction in config.instructions:
        return config.instructions.index(instruction)
    nearest = difflib.get_close_matches(instruction, config.instructions, n=1, cutoff=0.0)[0]
    raise ValueError(f"the policy must know the instruction, got {instruction!r}; nearest known: {nearest!r}")


def load_bc(folder: Path) -> ChunkedPolicy:
    """Load a folder written by `save_bc` as a policy.

    Raises:
        ValueError: a file is missing or damaged, or weights and configuration disagree.
    """
    network = load_network(folder)
    return ChunkedPolicy(BCPredictor(network), network.config.num_executed, network.config.ensemble_decay)


def load_network(folder: Path) -> BCNetwork:
    """Load the network of a folder written by `save_bc`.

    Raises:
        ValueError: a file is missing or damaged, or weights and configuration disagree.
    """
    config = build_config(BCConfig, read_config(folder), folder)
    return load_weights(BCNetwork(config), folder, "model")


def save_bc(network: BCNetwork, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` (float16); each appears whole or not at all."""
    save_weights(folder, "model", network.state_dict())
    write_config(folder, {"kind": "bc", **asdict(network.config)})


def _mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.GELU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.GELU(),
        nn.Linear(hidden_dim, out_dim),
    )
