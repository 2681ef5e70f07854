"""The one place that imports MuJoCo, so that the GL platform is chosen before the import."""

import os

os.environ.setdefault("MUJOCO_GL", "egl")

_NO_GL = "the twin needs OpenGL: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri, and set MUJOCO_GL=egl"

try:
    import mujoco
except ModuleNotFoundError as error:
    if error.name != "mujoco":
        raise
    raise ModuleNotFoundError("the twin needs MuJoCo: pip install 'worldsim[twin]'", name="mujoco") from error
except (ImportError, AttributeError, OSError) as error:  # PyOpenGL's ways to say that libEGL is missing
    raise RuntimeError(_NO_GL) from error

__all__ = ["make_renderer", "mujoco"]


def make_renderer(model: mujoco.MjModel, size: int) -> mujoco.Renderer:
    """Return a renderer for square images of `size` pixels.

    Raises:
        RuntimeError: there is no working OpenGL.
    """
    try:
        return mujoco.Renderer(model, size, size, max_geom=400)
    except (ImportError, RuntimeError, AttributeError, mujoco.FatalError) as error:
        raise RuntimeError(_NO_GL) from error
