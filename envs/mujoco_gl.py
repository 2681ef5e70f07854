"""The one place that imports MuJoCo, so that the GL platform is chosen before the import."""

import os

os.environ.setdefault("MUJOCO_GL", "egl")

import mujoco  # noqa: E402

__all__ = ["make_renderer", "mujoco"]


def make_renderer(model: mujoco.MjModel, size: int) -> mujoco.Renderer:
    """Return a renderer for square images of `size` pixels.

    Raises:
        RuntimeError: there is no working OpenGL.
    """
    try:
        return mujoco.Renderer(model, size, size, max_geom=400)
    except (ImportError, RuntimeError, AttributeError, mujoco.FatalError) as error:
        raise RuntimeError(
            "rendering needs OpenGL: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri, and set MUJOCO_GL=egl"
        ) from error
