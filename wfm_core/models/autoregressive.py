"""Autoregressive world model over FSQ tokens: one transformer pass a frame, all tokens of the next frame at once.

A *trunk* reads the current frame's tokens and action, alternating attention over cells and over time (causal, cached).
A small *refiner* reads the trunk's features and whatever tokens of the next frame are already known, and predicts the
rest; run once it predicts the frame in parallel, run k times it reveals the most confident tokens first. So a frame
costs one trunk pass, which is also what commits it to the cache, and k cheap refiner passes.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wfm_core.data.actions import ActionSpace
from wfm_core.models.blocks import SpaceBlock, TimeBlock
from wfm_core.models.motion import Contact, Motion
from wfm_core.models.places import PlaceHead, loss_of_places
from wfm_core.models.text import pooled
from wfm_core.models.transformer_blocks import within_bounds
from wfm_core.sampling import random_hidden
from wfm_core.tokenizers.fsq import FSQ
from wfm_core.world_model import Layout

SELF_FORCED_BATCHES = 0.5
"""Fraction of the batches that hold self-forced clips: the passes these need are paid for by whole batches."""
LONGEST_STALL = 6
"""Frames for which a stalled clip stands still at most."""
UNTOLD_CLIPS = 0.15
"""Fraction of the clips whose context does not say what was touched, for a random number of frames."""
UNTOLD_ACTIONS = 0.2
"""Fraction of the clips that do not say what was done in their first frame, as policies see it."""
CONTACT_DIM = 64
SURE = 10.0
"""Logit of what is certain."""
RAYS_DIM = 12
"""Pluecker coordinates of a cell's ray, and their change to the next frame."""


@dataclass(frozen=True)
class AutoregressiveConfig:
    """Sizes of an `Autoregressive`.

    `levels` are the tokenizer's FSQ levels; each cell's dimensions form `groups` tokens, the unit that refinement
    reveals. `time_layers` are the trunk layers that attend over time (the last `window` frames). `refine_steps` and
    `temperature` govern generation; `contact_temperature` governs the draw of `Contact`: at 1 a chance in a hundred of
    letting go, drawn in every frame, empties many a hand before the episode ends. In training, up to a fraction
    `corruption` of the context's cells is disturbed, a fraction `stalling` of the clips stands still for a few frames
    while the commands go on, a fraction `self_forcing` is, from the third frame on, what the model makes of it within
    up to `self_forcing_depth` steps, tokens that equal the current frame's weigh `unchanged_weight`, and those of
    watched cells `watched_weight`, changed or not. A fraction `closing_share` of the clips shows a hand that is told to
    close, whatever comes of it.

    A frame is that of `num_cameras` cameras, `grid` cells square each; `patch_size` cells square are read, and written,
    as one, which makes a network fast and coarse. `actions` says how actions are read. The model
    may also be told the instruction, `text_dim` features a word of the encoder `text_encoder`, and, with `rays`, from
    where each frame is seen. With `places_weight` it is also trained to say where things are, where the data know it.
    """

    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5) * 3
    grid: int = 8
    groups: int = 3
    width: int = 256
    num_heads: int = 4
    mlp_ratio: int = 4
    num_layers: int = 7
    time_layers: tuple[int, ...] = (1, 4)
    refiner_layers: int = 2
    window: int = 8
    refine_steps: int = 2
    temperature: float = 0.0
    contact_temperature: float = 0.5
    corruption: float = 0.15
    stalling: float = 0.15
    self_forcing: float = 0.3
    self_forcing_depth: int = 4
    unchanged_weight: float = 0.3
    watched_weight: float = 4.0
    closing_share: float = 0.0
    places_weight: float = 0.0
    num_cameras: int = 1
    patch_size: int = 1
    actions: ActionSpace = field(default_factory=ActionSpace)
    text_dim: int = 0
    text_encoder: str = ""
    rays: bool = False

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads, got {self.width} and {self.num_heads}")
        if len(self.levels) % self.groups:
            raise ValueError(f"groups must divide the {len(self.levels)} FSQ dimensions, got {self.groups}")
        if not all(0 <= i < self.num_layers for i in self.time_layers):
            raise ValueError(f"time_layers must lie in [0, {self.num_layers}), got {self.time_layers}")
        if self.num_cameras < 1:
            raise ValueError(f"num_cameras must be at least 1, got {self.num_cameras}")
        if self.grid % self.patch_size:
            raise ValueError(f"patch_size must divide grid, got {self.patch_size} and {self.grid}")
        if self.rays and self.patch_size > 1:
            raise ValueError(f"rays are those of single cells: patch_size must be 1, got {self.patch_size}")
        if self.text_encoder and not self.text_dim:
            raise ValueError(f"text_encoder={self.text_encoder!r} needs its features' size as text_dim, got 0")


class Autoregressive(nn.Module):
    """The network, and the loss that trains it: next-frame tokens from past tokens and actions.

    Tokens are FSQ level indices (..., n, C), n = num_cameras * grid * grid cells, camera by camera.
    Actions are physical (see `wfm_core.data.actions`), NaN where not known.
    """

    unreachable: Tensor
    action_low: Tensor
    action_range: Tensor
    travel_scale: Tensor

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = Layout((config.num_cameras, config.grid, config.grid), tuple(config.levels))
        self.num_cells = config.num_cameras * config.grid**2
        patch_cells = config.patch_size**2
        self.num_patches = self.num_cells // patch_cells
        self.num_dims = len(config.levels)
        self.max_level = max(config.levels)
        width = config.width
        self.fsq = FSQ(config.levels)
        one_hot_dim = patch_cells * self.num_dims * self.max_level
        self.embed = nn.Linear(one_hot_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(config.grid**2 // patch_cells, width))
        self.embed_action = nn.Sequential(
            nn.Linear(2 * config.actions.dim + config.actions.travel_dim, width), nn.GELU(), nn.Linear(width, width)
        )
        if config.num_cameras > 1:
            self.embed_camera = nn.Parameter(0.02 * torch.randn(config.num_cameras, width))
        if config.text_dim:
            self.embed_text = nn.Linear(config.text_dim, width, bias=False)
        if config.rays:
            self.embed_rays = nn.Linear(RAYS_DIM, width, bias=False)
        self.layers = nn.ModuleList(
            TimeBlock(width, config.num_heads, config.mlp_ratio, config.window, config.num_cameras)
            if i in config.time_layers
            else SpaceBlock(width, config.num_heads, config.mlp_ratio, config.num_cameras)
            for i in range(config.num_layers)
        )
        self.embed_known = nn.Linear(one_hot_dim + patch_cells * config.groups, width)
        self.refiner = nn.ModuleList(
            SpaceBlock(width, config.num_heads, config.mlp_ratio, config.num_cameras)
            for _ in range(config.refiner_layers)
        )
        self.embed_contact = nn.Embedding(len(Contact), width)
        self.embed_next_contact = nn.Embedding(len(Contact), width)
        for embedding in (self.embed_contact, self.embed_next_contact):
            nn.init.normal_(embedding.weight, std=0.02)
        self.contact_evidence = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CONTACT_DIM), nn.ReLU())
        self.contact_head = nn.Linear(CONTACT_DIM, len(Contact))
        if config.places_weight:
            self.place_head = PlaceHead(width, patch_cells)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, one_hot_dim)
        self.copy_gate = nn.Linear(width, patch_cells * config.groups)
        unreachable = torch.arange(self.max_level)[None, :] >= torch.tensor(config.levels)[:, None]
        self.register_buffer("unreachable", unreachable, persistent=False)
        low, high = torch.tensor(config.actions.low), torch.tensor(config.actions.high)
        scale = torch.tensor(config.actions.travel_scale)
        for name, value in {"action_low": low, "action_range": high - low, "travel_scale": scale}.items():
            self.register_buffer(name, value, persistent=False)

    # --- network -----------------------------------------------------------------------------------------------------

    def one_hot(self, tokens: Tensor) -> Tensor:
        """Token indices (..., C) to one-hot (..., C * max_level) in the weights' dtype."""
        levels = torch.arange(self.max_level, dtype=tokens.dtype, device=tokens.device)
        return (tokens[..., None] == levels).to(self.position.dtype).flatten(-2)

    def told(self, text: Tensor | None, rays: Tensor | None) -> Tensor | None:
        """Embed what a clip is told beside what went on.

        Args:
            text: (B, text_dim) features of the instruction, of a model that reads; None: there is none.
            rays: (B, T, n, RAYS_DIM) from `wfm_core.data.camera_rays.rays_ahead`, of a model that is told.

        Returns:
            Broadcastable to (B, T, n, D); None if there is nothing to tell.
        """
        parts = []
        if text is not None:
            parts.append(self.embed_text(text.to(self.position.dtype))[:, None, None])
        if rays is not None:
            parts.append(self.embed_rays(rays.to(self.position.dtype)))
        return sum(parts[1:], parts[0]) if parts else None

    def input_features(
        self,
        hot: Tensor,
        action: Tensor,
        previous_action: Tensor,
        travel: Tensor,
        contact: Tensor,
        told: Tensor | None = None,
    ) -> Tensor:
        """Embed one frame's inputs.

        Args:
            hot: one-hot tokens (B, T, n, C * max_level).
            action: (B, T, A) physical; NaN where it is not known, and then nothing is told of commands.
            previous_action: (B, T, A) physical.
            travel: (B, T, P) sum of the pose deltas commanded since the first context frame. It says where the arm is
                when the camera does not.
            contact: (B, T) int64 `Contact`.
            told: from `told`.

        Returns:
            (B, T, p, D), for p patches.
        """
        normalised = [within_bounds(each, self.action_low, self.action_range) for each in (action, previous_action)]
        commanded = torch.cat([*normalised, travel / self.travel_scale], dim=-1)
        known = commanded.isfinite().all(dim=-1, keepdim=True)
        embedded = self.embed_action(torch.where(known, commanded, 0).to(self.position.dtype)) * known
        x = self.embed(self._patched(hot)) + self._places() + (embedded + self.embed_contact(contact))[..., None, :]
        return x if told is None else x + told

    def _patched(self, x: Tensor) -> Tensor:
        """Put the cells of each patch side by side: (..., n, c) to (..., p, n / p * c)."""
        if self.config.patch_size == 1:
            return x
        return rearrange(x, "... (v h a w b) c -> ... (v h w) (a b c)", **self._sides)

    def _unpatched(self, x: Tensor) -> Tensor:
        """The other way round: (..., p, n / p * c) to (..., n, c)."""
        if self.config.patch_size == 1:
            return x
        return rearrange(x, "... (v h w) (a b c) -> ... (v h a w b) c", **self._sides)

    @property
    def _sides(self) -> dict[str, int]:
        size, patches = self.config.patch_size, self.config.grid // self.config.patch_size
        return {"v": self.config.num_cameras, "a": size, "b": size, "h": patches, "w": patches}

    def _places(self) -> Tensor:
        """What tells a patch where it is, (p, D)."""
        if self.config.num_cameras == 1:
            return self.position
        return (self.embed_camera[:, None] + self.position).flatten(0, 1)

    def forget_contact(self) -> None:
        """Make contact always unknown, in place, for data that say nothing of it; else all would be spent on that."""
        nn.init.zeros_(self.contact_head.weight)
        self.contact_head.bias.data.zero_()[Contact.UNKNOWN] = SURE

    def contact_logits(self, features: Tensor) -> Tensor:
        """Trunk features (..., p, D) to logits (..., len(Contact)) of the next frame's `Contact`, float32."""
        return self.contact_head(self.contact_evidence(features).mean(dim=-2)).float()

    def tell(self, features: Tensor, next_contact: Tensor) -> Tensor:
        """Add the next frame's int64 `Contact` (...) to trunk features (..., p, D)."""
        return features + self.embed_next_contact(next_contact)[..., None, :]

    def refine(self, features: Tensor, current: Tensor, known: Tensor, hidden: Tensor) -> Tensor:
        """Predict the next frame's tokens from what goes before it and what is already known of it.

        Args:
            features: (..., p, D) from `tell`.
            current: one-hot of the current frame's tokens (..., n, C * max_level).
            known: one-hot of the next frame's tokens, zero where hidden, same shape.
            hidden: (..., n, groups) bool.

        Returns:
            Logits (..., n, C, max_level); levels that do not exist are -inf.
        """
        seen = [self._patched(each) for each in (known, hidden.to(known.dtype))]
        x = features + self.embed_known(torch.cat(seen, dim=-1))
        for layer in self.refiner:
            x = layer(x)
        x = self.norm(x)
        per_group = self.num_dims // self.config.groups * self.max_level
        copied = current * self._unpatched(self.copy_gate(x)).repeat_interleave(per_group, dim=-1)
        logits = (self._unpatched(self.head(x)) + copied).unflatten(-1, (self.num_dims, self.max_level))
        return logits.masked_fill(self.unreachable, float("-inf"))

    def trunk(self, hot: Tensor, motion: Motion, told: Tensor | None = None) -> Tensor:
        """Features (B, T, p, D) of a whole clip, the anchor first, from one-hot tokens, what went on, and `told`."""
        x = self.input_features(hot, motion.action, motion.previous_action, motion.travel, motion.contact, told)
        for layer in self.layers:
            x = layer(x, motion.times) if isinstance(layer, TimeBlock) else layer(x)
        return x

    # --- training ----------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss.

        Args:
            batch: `tokens` (B, T, n, C) uint8, the anchor first; `next_tokens`, those of the frame after each, and
                `next_watched` (B, T, n) bool, its watched cells; `next_contact` (B, T) int64; the entries of `Motion`;
                `seed`, int64 scalar for the masks; for a model that is told, `text` (B, W, text_dim) and `rays`
                (B, T, n, RAYS_DIM); for one that says where things are, `places` (B, T, K, 3) of the first camera.
        """
        motion = Motion(*(batch[name] for name in Motion._fields))
        told = self.told(pooled(batch["text"]) if "text" in batch else None, batch.get("rays"))
        target, next_contact = batch["next_tokens"].long(), batch["next_contact"]
        inputs, motion, hidden = self._draw(batch["tokens"], motion, next_contact, told, batch["seed"])
        current = self.one_hot(inputs)
        features = self.trunk(current, motion, told)
        dims_hidden = hidden.repeat_interleave(self.num_dims // self.config.groups, dim=-1)  # (B, T, n, C)
        known = self.one_hot(target).unflatten(-1, (self.num_dims, -1)) * ~dims_hidden[..., None]
        logits = self.refine(self.tell(features, next_contact), current, known.flatten(-2), hidden).float()
        nll = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)
        changed = (target != inputs).any(dim=-1, keepdim=True)
        weight = torch.where(changed, 1.0, self.config.unchanged_weight)
        weight = torch.where(batch["next_watched"][..., None], self.config.watched_weight, weight) * dims_hidden
        loss = (nll * weight).sum() / weight.sum().clamp(min=1)
        contact_nll = F.cross_entropy(self.contact_logits(features).flatten(0, 1), next_contact.flatten())
        with torch.no_grad():
            moving = changed & dims_hidden
            hit = ((logits.argmax(-1) == target) & moving).sum() / moving.sum().clamp(min=1)
        loss, metrics = loss + contact_nll, {"changed_dim_accuracy": hit, "contact_nll": contact_nll.detach()}
        if self.config.places_weight:
            said = self._unpatched(self.place_head(features))[:, :, : self.config.grid**2]
            off, metrics["places_off"] = loss_of_places(said.unflatten(2, (self.config.grid, -1)), batch["places"])
            loss = loss + self.config.places_weight * off
        return loss, metrics

    # A generator is new in every step: one that reached compiled code would have it compiled anew in every step.
    @torch.compiler.disable(recursive=False)
    def _draw(
        self, tokens: Tensor, motion: Motion, next_contact: Tensor, told: Tensor | None, seed: Tensor
    ) -> tuple[Tensor, Motion, Tensor]:
        """What is random in a step: disturbed context (B, T, n, C) int64, what is told of motion, the hidden tokens."""
        generator = torch.Generator(device=tokens.device).manual_seed(int(seed))
        motion = self._withhold(motion, generator)
        inputs = self._corrupt(tokens, motion, next_contact, generator, told)
        batch, time, cells, _ = tokens.shape
        if self.config.refine_steps == 1:  # generation never shows a part of a frame
            return inputs, motion, tokens.new_ones(batch, time, cells, self.config.groups, dtype=torch.bool)
        hidden = random_hidden((batch, time), cells * self.config.groups, generator, tokens.device)
        return inputs, motion, hidden.unflatten(-1, (cells, -1))

    def _withhold(self, motion: Motion, generator: torch.Generator) -> Motion:
        """Hide the contact of the first frame, as at the start of a rollout; of some clips also more, and an action."""
        (batch, time), device = motion.contact.shape, motion.contact.device
        draws, moment = torch.rand(3, batch, 1, generator=generator, device=device), torch.arange(time, device=device)
        untold = torch.where(draws[0] < UNTOLD_CLIPS, 1 + (draws[1] * time).long(), 1)
        contact = motion.contact.masked_fill(moment < untold, Contact.UNKNOWN)
        no_action = ((draws[2] < UNTOLD_ACTIONS) & (moment == 0))[..., None]
        return motion._replace(contact=contact, action=motion.action.masked_fill(no_action, torch.nan))

    @torch.no_grad()
    def _corrupt(
        self,
        tokens: Tensor,
        motion: Motion,
        next_contact: Tensor,
        generator: torch.Generator,
        told: Tensor | None = None,
    ) -> Tensor:
        """Disturb context tokens (B, T, n, C) as generation would: own predictions, lag, off-by-one levels."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=tokens.device)

        batch, time, cells, dims = tokens.shape
        out = tokens.long()
        own, depth = out, 0
        if self.config.self_forcing > 0 and bool(uniform(1) < SELF_FORCED_BATCHES):
            depth = 1 + int(uniform(1) * self.config.self_forcing_depth)
        for _ in range(depth):  # each pass rolls every frame out by one step more, all at once
            predicted = self._predict_all(own, motion, next_contact, told)
            own = torch.cat([out[:, :2], predicted[:, 1:-1]], dim=1)  # nothing predicts the first two
        out = torch.where(uniform(batch, 1, 1, 1) < self.config.self_forcing / SELF_FORCED_BATCHES, own, out)
        out = self._stall(out, uniform(batch, 3))
        rate = uniform(batch, time, 1) * self.config.corruption
        which = uniform(batch, time, cells) / rate.clamp(min=1e-6)  # below 1: a disturbed cell
        shift = torch.randint(-1, 2, out.shape, generator=generator, device=tokens.device)
        top = torch.as_tensor(self.config.levels, device=out.device) - 1
        jittered = (out + shift * (uniform(batch, time, cells, dims) < 0.3)).clamp(min=0).minimum(top)
        late = torch.cat([out[:, :2], out[:, 1:-1]], dim=1)  # the frame before the second may be long ago
        out = torch.where((which < 0.6)[..., None], jittered, out)
        out = torch.where(((which >= 0.6) & (which < 1))[..., None], late, out)
        return torch.cat([tokens[:, :1].long(), out[:, 1:]], dim=1)  # the anchor is a real frame

    def _stall(self, tokens: Tensor, uniform: Tensor) -> Tensor:
        """Hold some clips (B, T, n, C) still for up to `LONGEST_STALL` frames; what decides is (B, 3) in [0, 1).

        Generation repeats a frame now and then. Who has never seen that takes it for an arm that commands do not move.
        """
        time = tokens.shape[1]
        moment = torch.arange(time, device=tokens.device)
        begin = 2 + (uniform[:, 0] * (time - 2)).long()[:, None]
        end = begin + 1 + (uniform[:, 1] * LONGEST_STALL).long()[:, None]
        still = (moment >= begin) & (moment < end) & (uniform[:, 2] < self.config.stalling)[:, None]
        return tokens.gather(1, torch.where(still, begin - 1, moment)[..., None, None].expand_as(tokens))

    def _predict_all(self, tokens: Tensor, motion: Motion, next_contact: Tensor, told: Tensor | None = None) -> Tensor:
        """The likeliest tokens after each frame of a clip, in one pass: int64 (B, T, n, C) to the same."""
        current = self.one_hot(tokens)
        hidden = torch.ones(*tokens.shape[:-1], self.config.groups, dtype=torch.bool, device=tokens.device)
        features = self.tell(self.trunk(current, motion, told), next_contact)
        return self.refine(features, current, torch.zeros_like(current), hidden).argmax(dim=-1)
