"""Settings of a training by reinforcement, and what they mean."""

from dataclasses import dataclass

OBJECTIVES = ("imitation", "ppo", "group")
TRAINED = ("heads", "readout", "all")


@dataclass
class ReinforceConfig:
    """One training by reinforcement.

    Attributes:
        num_updates: rollouts, and so updates, at most.
        rollout_steps: control steps of each row in a rollout; with objective="group", at most.
        objective: "imitation", cloning of the episodes that succeeded; "ppo", with a learned value; or "group", success
            relative to episodes that begin alike. The latter two want a tenth of the learning rate, and a larger
            displacement.
        group_size: episodes of a group.
        gamma: discount of a control step.
        gae_lambda: of generalised advantage estimation, of a decision.
        clip_low, clip_high: how far the ratio of probabilities may fall or rise before it stops to count.
        kl: weight of the divergence from the policy that training began with.
        cloning: weight of the loss of cloning on demonstrations, which are seen as they were filmed: what is imagined
            looks a little different, and who only sees that forgets how the world looks.
        action_std: of the displacement that is tried, in units of the action box.
        persistence: correlation of the displacements of two decisions in a row.
        learning_rate: of the actor.
        value_learning_rate: of the value.
        value_warmup: updates at first in which only the value learns; until it says something, an advantage is noise.
        num_epochs: passes over a rollout.
        imitation_steps: batches of successes in an update, with objective="imitation".
        agent_pos_noise: on the pose in these, in standard deviations of `agent_pos`; see `CloneConfig`.
        batch_size: decisions.
        trained: "heads", what sees stays as it is; "readout", all but the trunk; or "all". A policy of kind bc has no
            trunk.
        seed: of everything random.
        probe_every: updates between probes.
        patience: probes in a row that have to speak against going on.
        uncertainty_growth: factor on the first probe's mean uncertainty that speaks against going on.
        gap_growth: growth of imagined over true success that does, where the truth is probed.
    """

    num_updates: int = 60
    rollout_steps: int = 30
    objective: str = OBJECTIVES[0]
    group_size: int = 8
    gamma: float = 0.98
    gae_lambda: float = 0.95
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl: float = 0.0
    cloning: float = 0.0
    action_std: float = 0.03
    persistence: float = 0.8
    learning_rate: float = 3e-4
    value_learning_rate: float = 1e-3
    value_warmup: int = 2
    num_epochs: int = 4
    imitation_steps: int = 40
    agent_pos_noise: float = 0.1
    batch_size: int = 128
    trained: str = TRAINED[0]
    seed: int = 0
    probe_every: int = 10
    patience: int = 2
    uncertainty_growth: float = 1.5
    gap_growth: float = 0.15

    def __post_init__(self) -> None:
        for name, choices in (("objective", OBJECTIVES), ("trained", TRAINED)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("num_updates", "rollout_steps", "num_epochs", "batch_size", "probe_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2, got {self.group_size}")
        if not 0 < self.action_std < 1:
            raise ValueError(f"action_std must lie in (0, 1), got {self.action_std}")
        if not 0 <= self.persistence < 1:
            raise ValueError(f"persistence must lie in [0, 1), got {self.persistence}")


def is_trained(parameter: str, trained: str) -> bool:
    """Whether a parameter of the network, by its name, is trained."""
    heads = parameter.startswith(("waypoint_head", "action_head"))
    return trained == "all" or heads or (trained == "readout" and not parameter.startswith("trunk"))
