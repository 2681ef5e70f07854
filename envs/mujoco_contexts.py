"""Render the twin's initial states into `envs/assets/contexts.npz`: `python -m envs.mujoco_contexts`.

Run it again whenever the twin's scenes or the tasks' initial states change: a test compares the two.
"""

import numpy as np

from envs.contexts import CONTEXTS_PATH, write_contexts
from envs.mujoco_twin import MujocoBridge
from tasks import TASKS
from tasks.task import Task


def render_initial_states(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Reset the twin to every initial state: frames (K, 128, 128, 3) uint8 and agent_pos (K, 7) float32."""
    twin = MujocoBridge(task)
    frames, agent_pos = [], []
    for initial_state in task.initial_states:
        twin.reset(initial_state, np.random.default_rng(0))  # without factors of variation nothing is drawn
        frames.append(twin.render())
        agent_pos.append(twin.agent_pos())
    twin.close()
    return np.stack(frames), np.stack(agent_pos)


def main() -> None:
    """Write the file."""
    rendered = {name: render_initial_states(task) for name, task in TASKS.items()}
    write_contexts(
        CONTEXTS_PATH,
        {name: frames for name, (frames, _) in rendered.items()},
        {name: agent_pos for name, (_, agent_pos) in rendered.items()},
    )


if __name__ == "__main__":
    main()
