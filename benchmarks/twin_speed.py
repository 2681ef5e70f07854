"""Speed of the physics twin: control steps per second of one process at 128x128, physics and rendering included.

Run: python benchmarks/twin_speed.py [--quick]
"""

import argparse
import json
import time

import numpy as np

from envs.mujoco_bridge import MujocoBridgeVectorEnv
from tasks import TASKS


def measure(name: str, num_steps: int, render: bool) -> tuple[float, float]:
    """Return control steps per wall second and per CPU second of one task under smooth random actions."""
    env = MujocoBridgeVectorEnv(1, name, max_episode_steps=60)
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    twin = env.twins[0]
    actions = np.zeros((num_steps, 1, 7), np.float32)
    for i in range(1, num_steps):
        actions[i] = 0.8 * actions[i - 1] + 0.3 * rng.uniform(-1, 1, (1, 7))
    env.step(actions[0])
    wall, cpu = time.perf_counter(), time.process_time()
    for action in actions:
        if render:
            env.step(np.clip(action, -1, 1))
        else:
            twin.step(action[0] * 0.05)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    env.close()
    return num_steps / wall, num_steps / cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="150 steps a task instead of 1500")
    num_steps = 150 if parser.parse_args().quick else 1500
    print(f"{'task':24s} {'steps/s':>8s} {'steps/CPU s':>12s} {'without rendering':>18s}")
    figures = {}
    for name in TASKS:
        rendered, rendered_cpu = measure(name, num_steps, render=True)
        physics, _ = measure(name, num_steps, render=False)
        figures[name] = {
            "steps_per_second": round(rendered, 1),
            "steps_per_cpu_second": round(rendered_cpu, 1),
            "steps_per_second_without_rendering": round(physics, 1),
        }
        print(f"{name:24s} {rendered:8.0f} {rendered_cpu:12.0f} {physics:18.0f}")
    slowest = min(task["steps_per_second"] for task in figures.values())
    mean = len(figures) / sum(1 / task["steps_per_second"] for task in figures.values())
    print(f"slowest task {slowest:.0f}, all tasks together {mean:.0f} steps/s")
    print(json.dumps({"steps_per_second": round(mean, 1), "steps_per_second_slowest_task": slowest, "tasks": figures}))


if __name__ == "__main__":
    main()
