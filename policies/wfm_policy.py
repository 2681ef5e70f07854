"""A policy born from a world model: its trunk, which has learnt to see what moves, under the heads of an actor.

The trunk reads one frame's tokens without any command, as the world model may, and a keypoint head on its cells finds
the places that matter. It is trained by cloning, and by reinforcement in imagination, where the tokens come from the
world model itself and no pixel is drawn.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from policies.actor import ActorConfig, ActorNetwork, chunked, load_actor
from policies.chunking import ChunkedPolicy
from policies.latents import LatentView
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.checkpoint import build_config, read_config, read_part
from wfm_core.models.autoregressive import AutoregressiveConfig
from wfm_core.models.blocks import SpaceBlock, TimeBlock
from wfm_core.models.motion import Contact
from wfm_core.models.places import KINDS, PlaceHead
from wfm_core.tokenizers.fsq import FSQ
from worldsim.protocols import Obs

NOTES = 4
"""Numbers that are read at a keypoint besides where it is."""


class FrameTrunk(nn.Module):
    """The trunk of an `Autoregressive` for one frame of which nothing is known but how it looks.

    Attributes:
        width: D, of its features.
        side: patches along either axis of the frame, whose square is p.
        place_head: says where things are, if the world model has learnt it.
    """

    def __init__(self, config: AutoregressiveConfig, num_layers: int) -> None:
        super().__init__()
        self.width = width = config.width
        self.side = config.grid // config.patch_size
        self.fsq, self.max_level = FSQ(config.levels), max(config.levels)
        self.patch_size, patch_cells = config.patch_size, config.patch_size**2
        self.embed = nn.Linear(patch_cells * len(config.levels) * self.max_level, width)
        self.position = nn.Parameter(0.02 * torch.randn(self.side**2, width))
        self.layers = nn.ModuleList(
            TimeBlock(width, config.num_heads, config.mlp_ratio, config.window)
            if i in config.time_layers
            else SpaceBlock(width, config.num_heads, config.mlp_ratio)
            for i in range(num_layers)
        )
        self.place_head = PlaceHead(width, patch_cells) if config.places_weight else None

    def born_from(self, weights: dict[str, Tensor]) -> None:
        """Take over the weights of an `Autoregressive`; that nothing is known of contact becomes part of a place."""
        mine = {name: weights[name].float() for name in self.state_dict()}
        mine["position"] = mine["position"] + weights["embed_contact.weight"][Contact.UNKNOWN].float()
        self.load_state_dict(mine)

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents (B, h, w, C) to features (B, p, D) of p patches, and beside them what the place head says."""
        levels, size = torch.arange(self.max_level, device=latents.device), self.patch_size
        hot = (self.fsq.to_indices(latents)[..., None] == levels).flatten(-2)  # (B, h, w, C * max_level)
        hot = rearrange(hot, "b (h p) (w q) c -> b (h w) (p q c)", p=size, q=size)
        x = (self.embed(hot.to(self.position.dtype)) + self.position)[:, None]
        first = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
        for layer in self.layers:
            x = layer(x, first) if isinstance(layer, TimeBlock) else layer(x)
        x = x[:, 0]
        return x if self.place_head is None else torch.cat([x, self.place_head(x)], dim=-1)


def frame_trunk(folder: Path, num_layers: int) -> FrameTrunk:
    """Return the first `num_layers` layers of a world model's trunk, 0 for all, with random weights.

    Raises:
        ValueError: the checkpoint is of another kind than autoregressive, or of several cameras.
    """
    if (kind := read_config(folder).get("kind")) != "autoregressive":
        raise ValueError(f"world_model must be of kind autoregressive, got {kind!r} in {folder}")
    sizes = build_config(AutoregressiveConfig, read_part(folder, "dynamics"), folder)
    if sizes.num_cameras > 1:
        raise ValueError(f"world_model must have one camera, got {sizes.num_cameras} in {folder}")
    return FrameTrunk(sizes, num_layers or sizes.num_layers)


@dataclass
class WFMPolicyConfig(ActorConfig):
    """Which world model, and how much of it.

    Attributes:
        world_model: a shipped name or a folder, of kind autoregressive, of one camera.
        num_layers: of the trunk's, the first ones; 0 takes all.
    """

    world_model: str = DEFAULT_WORLD_MODEL
    num_layers: int = 0


class WFMPolicyNetwork(ActorNetwork[WFMPolicyConfig]):
    """Latents (B, h, w, C) float32, proprioception and instruction id to an action chunk and a waypoint.

    Raises:
        ValueError: no such world model, or of another kind, or of several cameras.
    """

    kind = "wfm"
    sees = "latents"
    grid: Tensor

    def __init__(self, config: WFMPolicyConfig) -> None:
        view = LatentView(config.world_model)
        trunk = frame_trunk(view.folder, config.num_layers)
        keypoints, width = config.num_keypoints, trunk.width
        # Whoever is told where things are needs no more, and with few demonstrations more is learnt by heart.
        more = 0 if trunk.place_head is not None else NOTES * keypoints + width
        super().__init__(config, seen_dim=4 * keypoints + more)
        self.view, self.trunk = view, trunk
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Linear(config.instruction_dim, keypoints * width)
        self.within = nn.Linear(width, 2 * keypoints)
        self.notes = nn.Linear(width, NOTES)
        self.side = trunk.side if trunk.place_head is None else trunk.side * trunk.patch_size
        centres = (torch.arange(self.side) + 0.5) * (2 / self.side) - 1
        down, across = torch.meshgrid(centres, centres, indexing="ij")
        self.register_buffer("grid", torch.stack([across, down], dim=-1).flatten(0, 1), persistent=False)
        self.kind_affinity = nn.Parameter(torch.zeros(keypoints, KINDS))

    def born(self) -> "WFMPolicyNetwork":
        """Take over the world model's weights, in place."""
        self.trunk.born_from(load_file(self.view.folder / "dynamics.safetensors"))
        return self

    def look(self, picture: Tensor) -> Tensor:
        """Return features (B, p, D) of the patches, and what the trunk says of places."""
        return self.trunk(picture)

    def see(self, looked: Tensor, embedding: Tensor) -> Tensor:
        """Return (B, seen_dim) float32: of K keypoints x and y in [-1, 1], height over the table, and how sure it is.

        Without a place head heights are 0, and what is read at the keypoints and the mean of all patches come after.
        """
        cells = self.norm(looked[..., : self.trunk.width])  # (B, p, D)
        queries = self.queries(embedding).unflatten(-1, (-1, cells.shape[-1]))  # (B, K, D)
        affinity = (queries @ cells.transpose(1, 2)).float()  # (B, K, p)
        at_patches = self._at_patches if self.trunk.place_head is None else self._at_things
        heat, places = at_patches(cells, affinity, looked[..., self.trunk.width :].float())
        seen = [places.flatten(1), heat.amax(dim=-1)]
        if self.trunk.place_head is None:
            seen += [(heat @ self.notes(cells).float()).flatten(1), cells.float().mean(dim=1)]
        return torch.cat(seen, dim=-1)

    def _at_patches(self, cells: Tensor, affinity: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        """Look at patches by affinity (B, K, p): how much at each, and where that is, (B, K, 3), of unknown height."""
        heat = affinity.softmax(dim=-1)
        # Each keypoint has a place of its own in a patch and round it, for it looks for a thing of its own.
        offsets = rearrange(self.within(cells).float().tanh(), "b p (k d) -> b k p d", d=2)
        places = (heat[..., None] * (self.grid + 2 / self.side * offsets)).sum(dim=2)
        return heat, F.pad(places, (0, 1))

    def _at_things(self, _: Tensor, affinity: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
        """The same at the things that the place head says (B, p, -1) there are, whose places it knows."""
        said = rearrange(said, "b p (c k o) -> b p c k o", k=KINDS, o=4)  # of c cells of each patch
        size, side = self.trunk.patch_size, self.trunk.side
        grid = rearrange(self.grid, "(h p w q) d -> (h w) (p q) 1 d", h=side, w=side, p=size)
        there = torch.cat([grid + 2 / self.side * said[..., 1:3], said[..., 3:]], dim=-1).flatten(1, 3)
        present = F.logsigmoid(said[..., 0])[:, None] + self.kind_affinity[:, None, None]  # (B, K, p, c, k)
        heat = (affinity[..., None, None] + present).flatten(2).softmax(dim=-1)
        return heat.unflatten(-1, (-1, size**2 * KINDS)).sum(dim=-1), heat @ there

    def picture(self, obs: Obs) -> Tensor:
        """Return the latents (B, h, w, C) of an observation, encoding its pixels if it has none."""
        return self.view.of(obs)


def load_network(folder: Path) -> WFMPolicyNetwork:
    """Load the network of a folder written by `WFMPolicyNetwork.save`; errors as for `load_actor`."""
    return load_actor(WFMPolicyNetwork, WFMPolicyConfig, folder)


def load_wfm(folder: Path) -> ChunkedPolicy:
    """Load a folder written by `WFMPolicyNetwork.save` as a policy; errors as for `load_actor`."""
    return chunked(load_network(folder))
