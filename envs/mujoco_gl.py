"""The one place that imports MuJoCo, so that the GL platform is chosen before the import."""

import atexit
import os
import weakref

os.environ.setdefault("MUJOCO_GL", "egl")

import mujoco  # noqa: E402

__all__ = ["make_renderer", "mujoco"]


def make_renderer(model: mujoco.MjModel, size: int) -> mujoco.Renderer:
    """Return a renderer for square images of `size` pixels.

    Raises:
        RuntimeError: there is no working OpenGL.
    """
    try:
        renderer = mujoco.Renderer(model, size, size, max_geom=400)
    except (ImportError, RuntimeError, AttributeError, mujoco.FatalError) as error:
        raise RuntimeError(
            "rendering needs OpenGL: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri, and set MUJOCO_GL=egl"
        ) from error
    # Registered after MuJoCo's own exit handler, so called before it: a renderer freed after EGL has ended is an error.
    atexit.register(_close, weakref.ref(renderer))
    return renderer


def _close(reference: weakref.ref[mujoco.Renderer]) -> None:
    renderer = reference()
    if renderer is not None:
        renderer.close()
