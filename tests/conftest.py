"""Process-wide settings that must hold before torch or mujoco is first imported."""

import os

# Two torch processes with two threads each on two cores are ten times slower than with one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MUJOCO_GL", "egl")
