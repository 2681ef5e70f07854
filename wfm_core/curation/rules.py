"""Which measured clips are kept."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from wfm_core.curation.measures import Measures


@dataclass(frozen=True)
class Rule:
    """A clip is dropped whose `measure` lies outside [low, high]; one of which it is not known passes."""

    measure: str
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"a rule for {self.measure} needs low <= high, got {self.low} and {self.high}")


RULES = {
    "too_short": Rule("num_frames", low=5),
    "too_small": Rule("height", low=48),
    "dark": Rule("dark", high=0.2),
    "overexposed": Rule("bright", high=0.2),
    "without_contrast": Rule("contrast", low=10),
    "blurred": Rule("sharpness", low=40),
    "frozen": Rule("frozen", high=0.6),
    "shaky": Rule("shake", high=0.02),
    "cut": Rule("cut", high=16),
    "static": Rule("change", low=0.1),
    "idle": Rule("idle", high=0.6),
    "gripper_never_moves": Rule("gripper_range", low=-math.inf),
    "teleport": Rule("state_jump", high=0.1),
    "actions_do_not_fit_states": Rule("state_match", low=0.7),
    "motion_does_not_fit_frames": Rule("frame_match", low=0.3),
}
"""In the order in which they are tried. Limits are loose: real Bridge clips pass them (docs/results.md). A gripper that
is never told to move is only measured, since pushing and wiping are such tasks; set low to drop them."""


VIDEO_RULES = {
    "too_brief": Rule("seconds", low=1),
    **{name: RULES[name] for name in ("too_short", "too_small", "dark", "overexposed", "without_contrast", "blurred")},
    "frozen": RULES["frozen"],
    "static": RULES["static"],
    "shaky": Rule("jitter", high=0.03),
    "text_overlay": Rule("letters", high=3),
}
"""Those of a clip of plain video, likewise; `wfm_core.curation.examine_video` measures it."""


def changed_rules(changes: Mapping[str, Mapping[str, float]], known: Mapping[str, Rule] = RULES) -> dict[str, Rule]:
    """`known` rules with other limits, by the rule's name, e.g. {"dark": {"high": 0.5}}.

    Raises:
        ValueError: no such rule or limit.
    """
    rules = dict(known)
    for name, limits in changes.items():
        if name not in rules or not limits.keys() <= {"low", "high"}:
            raise ValueError(f"rules must be low or high of {', '.join(known)}, got {name}: {dict(limits)}")
        rules[name] = replace(rules[name], **limits)
    return rules


def broken_rule(measures: Measures, rules: Mapping[str, Rule]) -> str | None:
    """The first rule that a clip breaks, or None. What is not a number breaks every rule."""
    for name, rule in rules.items():
        if rule.measure in measures and not rule.low <= measures[rule.measure] <= rule.high:
            return name
    return None
