"""Sizes of the latent video diffusion model, and what each costs to train."""

from dataclasses import dataclass, field

from wfm_core.data.actions import ActionSpace
from wfm_core.models.latent_network import LatentConfig
from wfm_core.models.positions import RopeConfig
from wfm_core.models.transformer_config import Cost, frames_in_sight
from wfm_core.samplers import SAMPLERS

ACTION_INJECTIONS = ("adaln", "cross_attention", "concat")
FORMULATIONS = ("edm", "flow")
WAVES_DIM = 64
"""Sines and cosines that tell a noise level or a step size."""
FINEST_STEPS = 128
"""Even steps of a flow that are as good as endless many: no smaller ones are put together to larger ones.

Source: Frans et al., "One Step Diffusion via Shortcut Models" (ICLR 2025), section 3.3.
"""


@dataclass(frozen=True)
class DiffusionConfig(LatentConfig):
    """Sizes of a `Diffusion`, its noise and how it samples.

    Latents are brought to the standard deviation `sigma_data`; `patch` cells square are one token. Blocks are modulated
    by corrections of rank `adaln_rank`. A frame sees the last `window` - 1 before it and the first. `action_injection`:
    the action that leads to a frame, and the sum of all that did, are added to what modulates it ("adaln"), attended to
    ("cross_attention"), or among the inputs of its tokens ("concat"). `text_dim` and `text_encoder` are as for
    `TransformerConfig`.

    `formulation` is "edm" or "flow". In training the logarithm of a frame's noise level ("flow": the logit of its time,
    before it is shifted by `shift`) has the mean `noise_mean` and the standard deviation `noise_std`, but for the
    fraction `wfm_core.models.diffusion.NOISIEST`. The frames of the past are noised too, by a level whose logarithm has
    `context_mean` and `context_std`; in rollouts they are shown as they are, and said to have the level
    `context_sigma`. Up to `chunk` frames are denoised together. A clip is denoised `copies` times at once, out of other
    noise: they share the past, which is half of the work. A fraction `untold` of the clips hides text and actions from
    the frames that are denoised, for guidance. In the loss, cells that a batch calls watched weigh `watched_weight`
    times as much as others.

    Frames are sampled in `num_steps` steps by `sampler`, with `guidance` (1: none); levels run from `sigma_max` to
    `sigma_min` with the exponent `rho` ("edm"), or over times shifted by `shift` ("flow"). `shortcut` above 0, for
    flows, is the share of frames that learn to go in one step as far as in two: such a model does with few steps.
    `actions` says how actions are read.
    """

    sigma_data: float = 1.0
    patch: int = 1
    width: int = 256
    head_dim: int = 64
    num_layers: int = 8
    num_heads: int = 4
    ffn_ratio: int = 4
    adaln_rank: int = 64
    window: int = 8
    action_injection: str = "adaln"
    text_dim: int = 0
    text_encoder: str = ""
    formulation: str = "edm"
    noise_mean: float = 0.0
    noise_std: float = 1.0
    shift: float = 1.0
    context_mean: float = -3.0
    context_std: float = 1.0
    context_sigma: float = 0.01
    chunk: int = 1
    copies: int = 1
    untold: float = 0.1
    watched_weight: float = 4.0
    shortcut: float = 0.0
    sampler: str = "multistep"
    num_steps: int = 8
    guidance: float = 1.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    rope: RopeConfig = field(default_factory=RopeConfig)
    actions: ActionSpace = field(default_factory=ActionSpace)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("action_injection", ACTION_INJECTIONS),
            ("formulation", FORMULATIONS),
            ("sampler", tuple(SAMPLERS)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.patch < 1 or any(size % self.patch for size in self.grid):
            raise ValueError(f"patch must divide the grid, got {self.patch} and {self.grid}")
        for name in ("chunk", "copies", "window", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min must lie in (0, sigma_max), got {self.sigma_min} and {self.sigma_max}")
        if not (0 <= self.untold < 1 and 0 <= self.shortcut < 1):
            raise ValueError(f"untold and shortcut must lie in [0, 1), got {self.untold} and {self.shortcut}")
        if self.guidance != 1 and not self.untold:
            raise ValueError(f"guidance needs untold above 0, got guidance={self.guidance} and untold=0")
        if self.text_encoder and not self.text_dim:
            raise ValueError(f"text_encoder={self.text_encoder!r} needs its features' size as text_dim, got 0")
        if self.shortcut:
            self._check_shortcut()

    def _check_shortcut(self) -> None:
        ways = (self.formulation, self.sampler, self.shift)
        if ways != ("flow", "euler", 1.0):
            raise ValueError(f"shortcut needs formulation=flow, sampler=euler and shift=1, got {ways}")
        if FINEST_STEPS % self.num_steps:
            raise ValueError(f"shortcut needs num_steps that divide {FINEST_STEPS}, got {self.num_steps}")

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame, n."""
        return self.grid[0] * self.grid[1] // self.patch**2

    @property
    def token_dim(self) -> int:
        """Numbers that a token stands for."""
        return self.latent_dim * self.patch**2

    @property
    def command_dim(self) -> int:
        """What the arm was told: the action that leads to a frame, and the sum of the steps up to it."""
        return self.actions.dim + self.actions.travel_dim

    @property
    def input_dim(self) -> int:
        """Inputs of a token: its numbers, those of its place in the frame before, whether its frame is of the past.

        And what was commanded and whether this is known, if that is concatenated.
        """
        return 2 * self.token_dim + 1 + (self.command_dim + 1 if self.action_injection == "concat" else 0)

    @property
    def context_dim(self) -> int:
        """Size of what is attended to beside frames; 0 for nothing."""
        return self.text_dim or (self.width if self.action_injection == "cross_attention" else 0)


def training_cost(
    config: DiffusionConfig,
    *,
    num_frames: int,
    batch_size: int = 1,
    text_words: int = 0,
    activation_width: int = 2,
    fused: bool = True,
) -> Cost:
    """Estimate memory and arithmetic of a training step in which frames are denoised one by one.

    Args:
        config: of the model.
        num_frames: of a clip, T >= 2.
        batch_size: clips.
        text_words: features of the text, W; 0 leaves text out.
        activation_width: bytes of an activation, 2 in bfloat16.
        fused: attention keeps no scores, as on a GPU; a CPU keeps them all.
    """
    width, mixed, tokens = config.width, config.num_heads * config.head_dim, config.frame_tokens
    predicted = num_frames - 1
    frames = (1 + config.copies) * predicted
    length = frames * tokens
    clean = [len(frames_in_sight(frame, config.window)) + 1 for frame in range(predicted)]
    noisy = [len(frames_in_sight(frame, config.window)) + 1 for frame in range(1, num_frames)] * config.copies
    pairs = tokens**2 * (sum(clean) + sum(noisy))
    joined = tokens * (sum(noisy) + sum(clean[config.window + 1 :]))
    attends = config.context_dim > 0 and (text_words > 0 or config.action_injection == "cross_attention")
    heard = 1 + text_words
    told = frames if config.action_injection == "cross_attention" else 0
    each = heard + (1 if told else 0)  # keys beside frames that a token attends to

    sublayers = 3 if config.context_dim else 2
    ffn_dim = config.ffn_ratio * width
    block = 2 * length * (4 * width * mixed + 2 * width * ffn_dim) + 4 * pairs * mixed
    block += 2 * frames * sublayers * (width * config.adaln_rank + config.adaln_rank * 3 * width)
    if attends:
        block += 2 * length * 2 * width * mixed + 4 * length * each * mixed
        block += 2 * (heard + told) * config.context_dim * 2 * mixed
    flops = config.num_layers * block + 2 * length * (width // 6 * 6 * width + config.input_dim * width)
    flops += 2 * length * width * config.token_dim + 2 * frames * (WAVES_DIM * width + width**2 + 5 * width**2)
    flops += 2 * config.copies * predicted * WAVES_DIM
    if config.action_injection != "concat":
        out = config.context_dim if told else width
        flops += 2 * frames * (config.command_dim * out + out**2)
    if config.shortcut:
        flops += (WAVES_DIM * width + width**2) * 2 * frames
        flops *= 1 + 2 / 3  # two more passes, without gradients: of three times a forward pass, two thirds

    # Of a token in a block: of each sublayer what goes into its norm, comes out and is modulated, and what is gated;
    # queries and keys before and after norm and turn, values, what attention gives, and three of the network's width.
    kept = 4 * sublayers * width + 8 * mixed + 3 * ffn_dim
    in_block = length * kept + 2 * joined * mixed + (0 if fused else config.num_heads * pairs)
    if attends:
        in_block += length * (3 * mixed + (0 if fused else config.num_heads * each))
    activations = batch_size * activation_width * config.num_layers * in_block
    frame_flops = flops / predicted
    return Cost(count_parameters(config), activations, frame_flops / tokens, frame_flops)


def count_parameters(config: DiffusionConfig) -> int:
    """Parameters of `Diffusion(config)`."""
    width, mixed, dim, rank = config.width, config.num_heads * config.head_dim, config.context_dim, config.adaln_rank
    ffn_dim = config.ffn_ratio * width
    block = 4 * width * mixed + 2 * config.head_dim + 2 * width * ffn_dim + ffn_dim + width
    block += (2 * width * mixed + 2 * dim * mixed + 2 * config.head_dim) if dim else 0
    block += (3 if dim else 2) * (width + 4 * width * rank)
    tells = WAVES_DIM * width + width + width**2 + width
    outer = (config.input_dim + 1) * width + width // 6 * 6 * width + (2 if config.shortcut else 1) * tells
    outer += 5 * (width**2 + width) + width + (width + 1) * config.token_dim + WAVES_DIM
    if config.action_injection != "concat":
        out = dim if config.action_injection == "cross_attention" else width
        outer += config.command_dim * out + out + out**2 + out + out
    return config.num_layers * block + outer
