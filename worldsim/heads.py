"""Heads: what the world model's latents say about reward, success, failure and the arm's pose.

What is imagined may lose a small thing behind the arm, and two frames in which it is gone look as if it were reached
or covered. A policy that learns in imagination finds that out. So heads may also see the frame in which imagination
began, which is real: `HeadsConfig.reference`.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tasks import REWARD_TERMS
from wfm_core.checkpoint import build_config, find_checkpoint, load_weights, parts_folder, read_part
from wfm_core.data.actions import ACTION_DIM, ACTION_HIGH, AGENT_POS_DIM
from wfm_core.models.blocks import SpaceBlock
from wfm_core.models.places import PlaceHead, loss_of_places

# Centre and half range of agent_pos (m, m, m, rad, rad, rad, openness), which bring it to about [-1, 1].
AGENT_POS_CENTRE = (0.3, 0.0, 0.15, 0.0, 0.0, 0.0, 0.5)
AGENT_POS_SCALE = (0.15, 0.25, 0.2, 0.8, 0.8, 1.6, 0.5)


@dataclass(frozen=True)
class HeadsConfig:
    """Sizes of `Heads`.

    `instructions` are those it can judge; `latent_shape` is the world model's (h, w, C); `patch_size` cells square are
    read as one. With `reference` the frame in which imagination began is seen as well. The pose that commands lead to
    stands unless the one that is seen is farther off than `sight_tolerance` (m). With `places_weight` heads also learn
    to say where things are, where the data know it. In training, the pose before is off by `pose_noise` of its range,
    and up to a fraction `corruption` of the cells.

    Raises:
        ValueError: patch_size does not divide the latents' sides.
    """

    instructions: tuple[str, ...]
    latent_shape: tuple[int, int, int] = (8, 8, 18)
    width: int = 128
    num_heads: int = 4
    num_layers: int = 3
    corruption: float = 0.1
    pose_noise: float = 0.05
    sight_tolerance: float = 0.02
    patch_size: int = 1
    reference: bool = False
    places_weight: float = 0.0

    def __post_init__(self) -> None:
        if any(side % self.patch_size for side in self.latent_shape[:2]):
            raise ValueError(f"patch_size must divide {self.latent_shape[:2]}, got {self.patch_size}")


@dataclass(frozen=True)
class HeadsOutput:
    """What the heads read from one control step.

    Attributes:
        reward_terms: (B, 4) float32 in [0, 1], in the order of `tasks.REWARD_TERMS`.
        success, failure: (B,) float32 probability that the task's test holds now.
        agent_pos: (B, 7) float32, metres, radians, gripper openness.
    """

    reward_terms: Tensor
    success: Tensor
    failure: Tensor
    agent_pos: Tensor


class Heads(nn.Module):
    """A small transformer over latents of two consecutive frames and the first, actions before each and instruction."""

    centre: Tensor
    scale: Tensor
    action_high: Tensor

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        height, grid_width, channels = config.latent_shape
        width = config.width
        patch_cells = config.patch_size**2
        self.embed_cells = nn.Linear((2 + config.reference) * patch_cells * channels, width)
        self.position = nn.Parameter(0.02 * torch.randn(height * grid_width // patch_cells, width))
        self.embed_instruction = nn.Embedding(len(config.instructions), width)
        self.embed_arm = nn.Linear(AGENT_POS_DIM + ACTION_DIM, width)
        self.layers = nn.ModuleList(SpaceBlock(width, config.num_heads, 4) for _ in range(config.num_layers))
        if config.places_weight:
            self.place_head = PlaceHead(width, patch_cells)
        self.norm = nn.LayerNorm(width)
        self.judge_head = nn.Linear(
            width, len(REWARD_TERMS) + 1
        )  # reward terms (success among them) and failure, logits
        self.arm_head = nn.Linear(width, AGENT_POS_DIM)
        # How much of the commands the arm carried out: at first all; less where its fingers stand on something.
        self.obeyed_head = nn.Linear(width, 1)
        nn.init.constant_(self.obeyed_head.bias, 4.0)
        # How far the arm goes at the previous and at the present command: at first all the way, and at once.
        self.arm_response = nn.Parameter(torch.tensor([[0.0], [1.0]]).repeat(1, AGENT_POS_DIM - 1))
        self.register_buffer("centre", torch.tensor(AGENT_POS_CENTRE), persistent=False)
        self.register_buffer("scale", torch.tensor(AGENT_POS_SCALE), persistent=False)
        self.register_buffer("action_high", torch.from_numpy(ACTION_HIGH), persistent=False)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Cast the bulk of the work, in place; what is read in and out stays float32, for poses to the millimetre."""
        self.embed_cells.to(dtype)
        self.layers.to(dtype)

    def instruction_id(self, instruction: str) -> int:
        """Index of an instruction.

        Raises:
            ValueError: the heads were not trained on it; names the nearest.
        """
        known = list(self.config.instructions)
        if instruction not in known:
            nearest = difflib.get_close_matches(instruction, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"the heads can judge {known}, got {instruction!r}; did you mean {nearest!r}?")
        return known.index(instruction)

    def _look(
        self, latents: Tensor, agent_pos: Tensor, actions: Tensor, instruction_id: Tensor, reference: Tensor
    ) -> Tensor:
        """Features (B, 2 + p, D): of the judgement, of the arm, and of p patches."""
        dtype = next(self.layers.parameters()).dtype
        size = self.config.patch_size
        if self.config.reference:
            latents = torch.cat([latents, reference[:, None]], dim=1)
        pairs = rearrange(latents, "b t (h p) (w q) c -> b (h w) (t p q c)", p=size, q=size)
        cells = self.embed_cells(pairs.to(dtype)) + self.position.to(dtype)
        arm = torch.cat([(agent_pos - self.centre) / self.scale, actions[:, 1] / self.action_high], dim=-1)
        summary = torch.stack([self.embed_instruction(instruction_id), self.embed_arm(arm)], dim=1)
        x = torch.cat([summary.to(dtype), cells], dim=1)
        for layer in self.layers:
            x = layer(x)
        return x

    def _read(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, 5) of judgements, the scaled agent_pos (B, 7) seen, the logit (B, 1) of the part obeyed."""
        x = self.norm(features[:, :2].float())
        return self.judge_head(x[:, 0]).float(), self.arm_head(x[:, 1]).float(), self.obeyed_head(x[:, 1]).float()

    def commanded(self, actions: Tensor) -> Tensor:
        """How far an arm that nothing blocks goes at actions (B, 2, 7), which it follows late: (B, 6), m and rad."""
        return (actions[..., :-1] * self.arm_response).sum(dim=1)

    @torch.no_grad()
    def read(
        self, latents: Tensor, agent_pos: Tensor, actions: Tensor, instruction_id: Tensor, reference: Tensor
    ) -> HeadsOutput:
        """Judge one control step.

        Args:
            latents: (B, 2, h, w, C), previous and current frame.
            agent_pos: (B, 7) at the previous frame.
            actions: (B, 2, 7) physical, that which led to the previous frame and that between the two.
            instruction_id: (B,) int64.
            reference: (B, h, w, C), of the frame in which imagination began.
        """
        logits, scaled, obeyed = self._read(self._look(latents, agent_pos, actions, instruction_id, reference))
        terms = sigmoid(logits)
        seen = scaled * self.scale + self.centre
        followed = agent_pos + F.pad(sigmoid(obeyed) * self.commanded(actions), (0, 1))
        # Commands are good to millimetres until one has no effect; sight is good to a centimetre, always.
        off = (seen - followed)[:, :3].norm(dim=-1, keepdim=True)
        trust = (1 - self.config.sight_tolerance / off).clamp(min=0)
        pose = torch.cat([(followed + trust * (seen - followed))[:, :-1], seen[:, -1:]], dim=-1)
        success = terms[:, REWARD_TERMS.index("success")]
        return HeadsOutput(terms[:, : len(REWARD_TERMS)], success, terms[:, -1], pose)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss.

        Args:
            batch: `latents` (B, 2, h, w, C), `agent_pos` (B, 2, 7), `actions` (B, 2, 7), `instruction_id`
                (B,), `reference` (B, h, w, C), `reward_terms` (B, 4), `failure` (B,), `seed`; and, with
                `places_weight`, `places` (B, K, 3) of `loss_of_places`.
        """
        latents, before = self._disturb(batch)
        told = batch["actions"], batch["instruction_id"], batch["reference"]
        features = self._look(latents, before, *told)
        logits, pose, obeyed = self._read(features)
        target = torch.cat([batch["reward_terms"], batch["failure"][:, None].float()], dim=-1)
        judged = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none").sum(dim=-1).mean()
        start, end = batch["agent_pos"].unbind(dim=1)
        went, commanded = (end - start)[:, :-1], self.commanded(batch["actions"])
        after, unit = (end - self.centre) / self.scale, self.scale[:-1]
        moved = F.smooth_l1_loss(pose, after, beta=0.05)
        moved = moved + F.smooth_l1_loss(commanded / unit, went / unit, beta=0.01)  # few are blocked: L1 lets them be
        obedience = _obedience_loss(obeyed[:, 0], went[:, :3], commanded[:, :3].detach())
        with torch.no_grad():
            success = REWARD_TERMS.index("success")
            truth = target[:, success] > 0.5
            right = ((logits[:, success] > 0) == truth).float()
            seen_error = ((pose - after) * self.scale)[:, :3].abs().mean()
            followed_error = (sigmoid(obeyed) * commanded - went)[:, :3].abs().mean()
        metrics = {
            "success_accuracy": right.mean(),
            "seen_error_mm": 1000 * seen_error,
            "followed_error_mm": 1000 * followed_error,
        }
        loss = judged + 10 * moved + obedience
        if self.config.places_weight:
            size, width = self.config.patch_size, self.config.latent_shape[1] // self.config.patch_size
            said = self.place_head(features[:, 2:].float())
            said = rearrange(said, "b (h w) (p q c) -> b 1 (h p) (w q) c", w=width, p=size, q=size)
            off, distance = loss_of_places(said, batch["places"][:, None])
            loss, metrics = loss + self.config.places_weight * off, metrics | {"places_off": distance}
        return loss, metrics

    # A generator is new in every step: one that reached compiled code would have it compiled anew in every step.
    @torch.compiler.disable
    def _disturb(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The batch's latents and the pose before, about as right as imagined ones are."""
        latents, pose = batch["latents"], batch["agent_pos"][:, 0]
        generator = torch.Generator(device=latents.device).manual_seed(int(batch["seed"]))
        noise = torch.randn(pose.shape, generator=generator, device=pose.device)
        before = pose + self.config.pose_noise * noise * self.scale
        keep = torch.rand(latents.shape[:-1], generator=generator, device=latents.device)
        shift = 0.3 * torch.randn(latents.shape, generator=generator, device=latents.device)
        return (latents + shift * (keep < self.config.corruption)[..., None]).clamp(-1, 1), before


def _obedience_loss(obeyed: Tensor, went: Tensor, commanded: Tensor) -> Tensor:
    """Cross entropy of logits (B,) with the part gone of the way (B, 3) commanded; longer ways weigh more."""
    length = commanded.norm(dim=-1).clamp(min=1e-6)
    part = ((went * commanded).sum(dim=-1) / length.square()).clamp(0, 1)
    return F.binary_cross_entropy_with_logits(obeyed, part, length / length.mean())


def sigmoid(x: Tensor) -> Tensor:
    """Float32 sigmoid of any shape, blind to a row's place: float32's own vector and scalar kernels differ."""
    return x.double().sigmoid().float()


def load_heads(name_or_path: str | Path) -> Heads:
    """Load the heads of a world-model checkpoint, float32.

    Raises:
        ValueError: unknown checkpoint, or its heads are missing or damaged.
    """
    folder = parts_folder(find_checkpoint(name_or_path))
    return load_weights(Heads(build_config(HeadsConfig, read_part(folder, "heads"), folder)), folder, "heads")
