"""Autoregressive world model over FSQ tokens: one transformer pass a frame, all tokens of the next frame at once.

A *trunk* reads the current frame's tokens and action, alternating attention over cells and over time (causal, cached).
A small *refiner* reads the trunk's features and whatever tokens of the next frame are already known, and predicts the
rest; run once it predicts the frame in parallel, run k times it reveals the most confident tokens first. So a frame
costs one trunk pass, which is also what commits it to the cache, and k cheap refiner passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wfm_core.data.actions import ACTION_DIM, ACTION_HIGH, ACTION_LOW
from wfm_core.models.blocks import SpaceBlock, TimeBlock
from wfm_core.models.motion import TRAVEL_DIM, TRAVEL_SCALE, Contact, Motion, is_blocked
from wfm_core.sampling import choose, random_hidden, reveal_counts, row_uniform
from wfm_core.tokenizers.fsq import FSQ
from wfm_core.world_model import Layout, ModelState, no_motion

SELF_FORCED_BATCHES = 0.5
"""Fraction of the batches that hold self-forced clips: the passes these need are paid for by whole batches."""
LONGEST_STALL = 6
"""Frames for which a stalled clip stands still at most."""
UNTOLD_CLIPS = 0.15
"""Fraction of the clips whose context does not say what was touched, for a random number of frames."""
CONTACT_DRAW = 1023
"""Index of the draw that decides contact; refinement draws come below."""
CONTACT_DIM = 64


@dataclass(frozen=True)
class AutoregressiveConfig:
    """Sizes of an `AutoregressiveModel`.

    `levels` are the tokenizer's FSQ levels; each cell's dimensions form `groups` tokens, the unit that refinement
    reveals. `time_layers` are the trunk layers that attend over time (the last `window` frames). `refine_steps` and
    `temperature` govern generation; `contact_temperature` governs the draw of `Contact`: at 1 a chance in a hundred of
    letting go, drawn in every frame, empties many a hand before the episode ends. In training, up to a fraction
    `corruption` of the context's cells is disturbed, a fraction `stalling` of the clips stands still for a few frames
    while the commands go on, a fraction `self_forcing` is, from the third frame on, what the model makes of it within
    up to `self_forcing_depth` steps, tokens that equal the current frame's weigh `unchanged_weight`, and those of
    watched cells `watched_weight`, changed or not.
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

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads, got {self.width} and {self.num_heads}")
        if len(self.levels) % self.groups:
            raise ValueError(f"groups must divide the {len(self.levels)} FSQ dimensions, got {self.groups}")
        if not all(0 <= i < self.num_layers for i in self.time_layers):
            raise ValueError(f"time_layers must lie in [0, {self.num_layers}), got {self.time_layers}")


class AutoregressiveModel(nn.Module):
    """Next-frame tokens from past tokens and actions.

    Tokens are FSQ level indices (..., n, C), n = grid * grid cells; actions are physical (see `wfm_core.data.actions`).
    """

    unreachable: Tensor
    action_low: Tensor
    action_range: Tensor

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = Layout((1, config.grid, config.grid), tuple(config.levels))
        self.num_cells = config.grid**2
        self.num_dims = len(config.levels)
        self.max_level = max(config.levels)
        width = config.width
        self.fsq = FSQ(config.levels)
        one_hot_dim = self.num_dims * self.max_level
        self.embed = nn.Linear(one_hot_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(self.num_cells, width))
        self.embed_action = nn.Sequential(
            nn.Linear(2 * ACTION_DIM + TRAVEL_DIM, width), nn.GELU(), nn.Linear(width, width)
        )
        self.layers = nn.ModuleList(
            TimeBlock(width, config.num_heads, config.mlp_ratio, config.window)
            if i in config.time_layers
            else SpaceBlock(width, config.num_heads, config.mlp_ratio)
            for i in range(config.num_layers)
        )
        self.embed_known = nn.Linear(one_hot_dim + config.groups, width)
        self.refiner = nn.ModuleList(
            SpaceBlock(width, config.num_heads, config.mlp_ratio) for _ in range(config.refiner_layers)
        )
        self.embed_contact = nn.Embedding(len(Contact), width)
        self.embed_next_contact = nn.Embedding(len(Contact), width)
        for embedding in (self.embed_contact, self.embed_next_contact):
            nn.init.normal_(embedding.weight, std=0.02)
        self.contact_evidence = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CONTACT_DIM), nn.ReLU())
        self.contact_head = nn.Linear(CONTACT_DIM, len(Contact))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, one_hot_dim)
        self.copy_gate = nn.Linear(width, config.groups)
        unreachable = torch.arange(self.max_level)[None, :] >= torch.tensor(config.levels)[:, None]
        self.register_buffer("unreachable", unreachable, persistent=False)
        self.register_buffer("action_low", torch.from_numpy(ACTION_LOW), persistent=False)
        self.register_buffer("action_range", torch.from_numpy(ACTION_HIGH - ACTION_LOW), persistent=False)

    # --- network -----------------------------------------------------------------------------------------------------

    def one_hot(self, tokens: Tensor) -> Tensor:
        """Token indices (..., C) to one-hot (..., C * max_level) in the weights' dtype."""
        levels = torch.arange(self.max_level, dtype=tokens.dtype, device=tokens.device)
        return (tokens[..., None] == levels).to(self.position.dtype).flatten(-2)

    def input_features(
        self, hot: Tensor, action: Tensor, previous_action: Tensor, travel: Tensor, contact: Tensor
    ) -> Tensor:
        """Embed one frame's inputs.

        Args:
            hot: one-hot tokens (B, T, n, C * max_level).
            action: (B, T, 7) physical.
            previous_action: (B, T, 7) physical.
            travel: (B, T, 6) sum of the pose deltas commanded since the first context frame. It says where the arm is
                when the camera does not.
            contact: (B, T) int64 `Contact`.

        Returns:
            (B, T, n, D).
        """
        normalised = [(a - self.action_low) / self.action_range * 2 - 1 for a in (action, previous_action)]
        commanded = torch.cat([*normalised, travel / travel.new_tensor(TRAVEL_SCALE)], dim=-1)
        embedded = self.embed_action(commanded.to(self.position.dtype)) + self.embed_contact(contact)
        return self.embed(hot) + self.position + embedded[..., None, :]

    def contact_logits(self, features: Tensor) -> Tensor:
        """Trunk features (..., n, D) to logits (..., len(Contact)) of the next frame's `Contact`, float32."""
        return self.contact_head(self.contact_evidence(features).mean(dim=-2)).float()

    def tell(self, features: Tensor, next_contact: Tensor) -> Tensor:
        """Add the next frame's int64 `Contact` (...) to trunk features (..., n, D)."""
        return features + self.embed_next_contact(next_contact)[..., None, :]

    def refine(self, features: Tensor, current: Tensor, known: Tensor, hidden: Tensor) -> Tensor:
        """Predict the next frame's tokens from what goes before it and what is already known of it.

        Args:
            features: (..., n, D) from `tell`.
            current: one-hot of the current frame's tokens (..., n, C * max_level).
            known: one-hot of the next frame's tokens, zero where hidden, same shape.
            hidden: (..., n, groups) bool.

        Returns:
            Logits (..., n, C, max_level); levels that do not exist are -inf.
        """
        x = features + self.embed_known(torch.cat([known, hidden.to(known.dtype)], dim=-1))
        for layer in self.refiner:
            x = layer(x)
        x = self.norm(x)
        per_group = self.num_dims // self.config.groups * self.max_level
        copied = current * self.copy_gate(x).repeat_interleave(per_group, dim=-1)
        logits = (self.head(x) + copied).unflatten(-1, (self.num_dims, self.max_level))
        return logits.masked_fill(self.unreachable, float("-inf"))

    def trunk(self, hot: Tensor, motion: Motion) -> Tensor:
        """Features (B, T, n, D) of a whole clip, the anchor first, from one-hot tokens and what went on."""
        x = self.input_features(hot, motion.action, motion.previous_action, motion.travel, motion.contact)
        for layer in self.layers:
            x = layer(x, motion.times) if isinstance(layer, TimeBlock) else layer(x)
        return x

    # --- training ----------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss.

        Args:
            batch: `tokens` (B, T, n, C) uint8, the anchor first; `next_tokens`, those of the frame after each, and
                `next_watched` (B, T, n) bool, its watched cells; `next_contact` (B, T) int64, its `Contact`; the
                entries of `Motion`; and `seed`, int64 scalar for the masks.
        """
        motion = Motion(*(batch[name] for name in Motion._fields))
        target, next_contact = batch["next_tokens"].long(), batch["next_contact"]
        inputs, motion, hidden = self._draw(batch["tokens"], motion, next_contact, batch["seed"])
        current = self.one_hot(inputs)
        features = self.trunk(current, motion)
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
        return loss + contact_nll, {"changed_dim_accuracy": hit, "contact_nll": contact_nll.detach()}

    # A generator is new in every step: one that reached compiled code would have it compiled anew in every step.
    @torch.compiler.disable(recursive=False)
    def _draw(
        self, tokens: Tensor, motion: Motion, next_contact: Tensor, seed: Tensor
    ) -> tuple[Tensor, Motion, Tensor]:
        """What is random in a step: disturbed context (B, T, n, C) int64, what is told of motion, the hidden tokens."""
        generator = torch.Generator(device=tokens.device).manual_seed(int(seed))
        motion = motion._replace(contact=self._withhold(motion.contact, generator))
        inputs = self._corrupt(tokens, motion, next_contact, generator)
        batch, time, cells, _ = tokens.shape
        hidden = random_hidden((batch, time), cells * self.config.groups, generator, tokens.device)
        return inputs, motion, hidden.unflatten(-1, (cells, -1))

    def _withhold(self, contact: Tensor, generator: torch.Generator) -> Tensor:
        """Hide the contact (B, T) of the first frame, as at the start of a rollout, and of some clips' first frames."""
        batch, time = contact.shape
        draws = torch.rand(2, batch, 1, generator=generator, device=contact.device)
        untold = torch.where(draws[0] < UNTOLD_CLIPS, 1 + (draws[1] * time).long(), 1)
        return contact.masked_fill(torch.arange(time, device=contact.device) < untold, Contact.UNKNOWN)

    @torch.no_grad()
    def _corrupt(self, tokens: Tensor, motion: Motion, next_contact: Tensor, generator: torch.Generator) -> Tensor:
        """Disturb context tokens (B, T, n, C) as generation would: own predictions, lag, off-by-one levels."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=tokens.device)

        batch, time, cells, dims = tokens.shape
        out = tokens.long()
        own, depth = out, 0
        if self.config.self_forcing > 0 and bool(uniform(1) < SELF_FORCED_BATCHES):
            depth = 1 + int(uniform(1) * self.config.self_forcing_depth)
        for _ in range(depth):  # each pass rolls every frame out by one step more, all at once
            predicted = self._predict_all(own, motion, next_contact)
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

    def _predict_all(self, tokens: Tensor, motion: Motion, next_contact: Tensor) -> Tensor:
        """The likeliest tokens after each frame of a clip, in one pass: int64 (B, T, n, C) to the same."""
        current = self.one_hot(tokens)
        hidden = torch.ones(*tokens.shape[:-1], self.config.groups, dtype=torch.bool, device=tokens.device)
        features = self.tell(self.trunk(current, motion), next_contact)
        return self.refine(features, current, torch.zeros_like(current), hidden).argmax(dim=-1)

    # --- generation --------------------------------------------------------------------------------------------------

    def start(self, tokens: Tensor, actions: Tensor, seeds: Sequence[int], text: Tensor | None = None) -> ModelState:
        """Prefill the context: tokens (B, T, n, C), actions (B, T - 1, 7) between the frames, B row seeds; no text."""
        assert text is None, "this family does not read"
        batch, time = tokens.shape[:2]
        heads, window = self.config.num_heads, self.config.window
        cache_shape = (batch, 2, self.num_cells, heads, self.config.width // heads)
        device, dtype = tokens.device, self.position.dtype
        state: ModelState = {
            f"cache{i}.{k}": torch.zeros(cache_shape, device=device, dtype=dtype)
            for i in self.config.time_layers
            for k in range(window)
        }
        state |= {
            "tokens": tokens[:, 0].to(torch.uint8),
            "contact": torch.full((batch,), Contact.UNKNOWN, device=device),
            "next_contact": torch.full((batch,), Contact.UNKNOWN, device=device),  # a caller may say what comes
            "previous_action": torch.full((batch, ACTION_DIM), float("nan"), device=device),  # nan: there was none
            "travel": torch.zeros(batch, TRAVEL_DIM, device=device),
            "count": torch.zeros(batch, dtype=torch.int64, device=device),
            "seed": torch.as_tensor(list(seeds), dtype=torch.int64, device=device),
            "step": torch.zeros(batch, dtype=torch.int64, device=device),
        }
        for t in range(time - 1):
            state, _ = self._trunk_step(state, actions[:, t], self.one_hot(state["tokens"]))
            state["tokens"] = tokens[:, t + 1].to(torch.uint8)
            state["travel"] = state["travel"] + actions[:, t, :TRAVEL_DIM]
        return state

    def step(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor]:
        """Predict the next frame: physical action (B, 7) to the next state and the uncertainty (B,) in [0, 1].

        The new frame's tokens are `state["tokens"]`, its contact is `state["contact"]`: drawn, or else what the caller
        put into `state["next_contact"]`. The uncertainty is one less the geometric mean probability of the tokens
        chosen when nothing of the frame is known yet, averaged over cells.
        """
        counts = reveal_counts(self.num_cells * self.config.groups, self.config.refine_steps)
        return self._step(state, action, counts)

    def step_token_by_token(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor]:
        """As `step`, but a cell's worth of tokens a pass: the reference for what parallel decoding gains."""
        return self._step(state, action, [self.config.groups] * self.num_cells)

    def _step(self, state: ModelState, action: Tensor, counts: list[int]) -> tuple[ModelState, Tensor]:
        """As `step`; `counts[i]` tokens are revealed at refinement step i."""
        current = self.one_hot(state["tokens"])
        state, features = self._trunk_step(state, action, current)
        uniform = row_uniform(state["seed"], state["step"], CONTACT_DRAW, 1)[:, 0]
        drawn = choose(self.contact_logits(features), self.config.contact_temperature, uniform)
        told = state["next_contact"]
        state["contact"] = torch.where(told == Contact.UNKNOWN, drawn, told)
        went = ~is_blocked(state["contact"])[:, None]
        state["travel"] = state["travel"] + action[:, :TRAVEL_DIM] * went
        state["next_contact"] = torch.full_like(told, Contact.UNKNOWN)
        tokens, uncertainty = self._reveal(self.tell(features, state["contact"]), current, state, counts)
        return {**state, "tokens": tokens, "step": state["step"] + 1}, uncertainty

    def _trunk_step(self, state: ModelState, action: Tensor, current: Tensor) -> tuple[ModelState, Tensor]:
        """Commit the current frame and its action to the caches; returns features (B, n, D)."""
        before = state["previous_action"]
        previous = torch.where(before.isnan(), no_motion(action), before)  # nothing came before
        x = self.input_features(
            current[:, None], action[:, None], previous[:, None], state["travel"][:, None], state["contact"][:, None]
        )
        count = state["count"]
        # A clone, because the caller may write its next action into the same memory.
        state = {**state, "previous_action": action.clone(), "count": count + 1}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, TimeBlock):
                names = [f"cache{i}.{k}" for k in range(self.config.window)]
                x, cache = layer.step(x, [state[name] for name in names], count)
                state |= zip(names, cache, strict=True)
            else:
                x = layer(x)
        return state, x[:, 0]

    def _reveal(self, features: Tensor, current: Tensor, state: ModelState, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Choose the next frame's tokens, `counts[i]` (cell, group) tokens at refinement step i, the surest first."""
        batch = features.shape[0]
        groups, per_group = self.config.groups, self.num_dims // self.config.groups
        hidden = torch.ones(batch, self.num_cells, groups, dtype=torch.bool, device=features.device)
        tokens = torch.zeros(batch, self.num_cells, self.num_dims, dtype=torch.int64, device=features.device)
        known = torch.zeros_like(current)
        uncertainty = torch.zeros(batch, device=features.device)
        for draw, count in enumerate(counts):
            logits = self.refine(features, current, known, hidden).float()
            uniform = None
            if self.config.temperature > 0:
                uniform = row_uniform(state["seed"], state["step"], draw, tokens[0].numel()).view(tokens.shape)
            proposal = choose(logits, self.config.temperature, uniform)
            last = draw == len(counts) - 1
            if draw == 0 or not last:
                log_p = logits.log_softmax(dim=-1).gather(-1, proposal[..., None]).squeeze(-1)
                confidence = log_p.unflatten(-1, (groups, per_group)).mean(dim=-1)  # (B, n, groups)
            if draw == 0:
                uncertainty = 1 - confidence.exp().mean(dim=(1, 2))
            if last:
                reveal = hidden
            else:
                ranked = confidence.masked_fill(~hidden, float("-inf")).flatten(1)
                chosen = ranked.topk(count, dim=1).indices
                reveal = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, chosen, True).view_as(hidden)
            tokens = torch.where(reveal.repeat_interleave(per_group, dim=-1), proposal, tokens)
            hidden = hidden & ~reveal
            if not last:
                dims_known = ~hidden.repeat_interleave(per_group, dim=-1)
                known = (self.one_hot(tokens).unflatten(-1, (self.num_dims, -1)) * dims_known[..., None]).flatten(-2)
        return tokens.to(torch.uint8), uncertainty
