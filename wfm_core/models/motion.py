"""What goes on in a clip besides what its frames show: commands, and what the robot touches."""

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class Contact(IntEnum):
    """What the robot and the world do to each other in a frame; drawn once a frame, before its tokens.

    Whether fingers closed around an object shows in many tokens. Chosen one by one they would show whatever is likelier
    than not in each; drawn first, the outcome is one, and comes as often as it should. A model trained on data without
    such labels has learnt that contact is always unknown.

    MOVED is an object that moves without being held; BLOCKED an arm that does not go where it is told to, because its
    fingers stand on something; HELD_BLOCKED an object held meanwhile.
    """

    FREE = 0
    MOVED = 1
    HELD = 2
    BLOCKED = 3
    HELD_BLOCKED = 4
    UNKNOWN = 5


class Motion(NamedTuple):
    """What went on over a clip of T frames, besides what they show.

    Attributes:
        action: (B, T, A) physical, sent after each frame; NaN where it is not known.
        previous_action: (B, T, A) physical, sent before it; no motion at an episode's first frame.
        travel: (B, T, P) sum of the pose deltas commanded since the first frame, but for those that came to nothing
            (`is_blocked`). It says where the arm is when the camera does not.
        times: (B, T) int64 control step of each frame.
        contact: (B, T) int64 `Contact` of each frame.
    """

    action: Tensor
    previous_action: Tensor
    travel: Tensor
    times: Tensor
    contact: Tensor


def is_blocked(contact: Tensor) -> Tensor:
    """Whether the arm did not go where it was told to, bool of the shape of an int64 tensor of `Contact`."""
    return (contact == Contact.BLOCKED) | (contact == Contact.HELD_BLOCKED)
