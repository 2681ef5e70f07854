"""What success means: six tasks of a Bridge-style robot, in a simulator-free form."""

from tasks.layout import jitter_initial_state, sample_initial_state
from tasks.push_cube import PUSH_CUBE
from tasks.put_carrot_on_plate import PUT_CARROT_ON_PLATE
from tasks.put_eggplant_in_basket import PUT_EGGPLANT_IN_BASKET
from tasks.put_spoon_on_towel import PUT_SPOON_ON_TOWEL
from tasks.reach_target import REACH_TARGET
from tasks.stack_cubes import STACK_CUBES
from tasks.task import (
    REWARD_TERMS,
    REWARD_WEIGHTS,
    SUCCESS_HOLD_STEPS,
    InitialState,
    Pose,
    SceneObject,
    Task,
    TaskState,
    held,
)

TASKS: dict[str, Task] = {
    "reach_target": REACH_TARGET,
    "push_cube": PUSH_CUBE,
    "put_spoon_on_towel": PUT_SPOON_ON_TOWEL,
    "put_carrot_on_plate": PUT_CARROT_ON_PLATE,
    "stack_cubes": STACK_CUBES,
    "put_eggplant_in_basket": PUT_EGGPLANT_IN_BASKET,
}
"""Every task by name."""

__all__ = [
    "REWARD_TERMS",
    "REWARD_WEIGHTS",
    "SUCCESS_HOLD_STEPS",
    "TASKS",
    "InitialState",
    "Pose",
    "SceneObject",
    "Task",
    "TaskState",
    "held",
    "jitter_initial_state",
    "sample_initial_state",
]
