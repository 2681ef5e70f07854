"""Objects of primitive geoms, each inside its `SceneObject` bounding box, which is centred on the body's origin."""

from collections.abc import Callable, Sequence

import numpy as np

from envs.mujoco_gl import mujoco
from tasks.put_eggplant_in_basket import BASKET_FLOOR_HEIGHT, BASKET_WALL
from tasks.task import SceneObject

# Fingers and hand are contype 1 / conaffinity 2; everything else collides with them and with itself.
OBJECT_CONTACTS = {"contype": 2, "conaffinity": 3, "condim": 4, "friction": (0.5, 0.005, 0.0001)}
ROUND_CONTACTS = {"contype": 2, "conaffinity": 3, "condim": 6, "friction": (0.5, 0.01, 0.004)}  # rolling dies out
VISUAL = {"contype": 0, "conaffinity": 0, "density": 0.0}

_TYPES = {
    "box": mujoco.mjtGeom.mjGEOM_BOX,
    "sphere": mujoco.mjtGeom.mjGEOM_SPHERE,
    "capsule": mujoco.mjtGeom.mjGEOM_CAPSULE,
    "cylinder": mujoco.mjtGeom.mjGEOM_CYLINDER,
    "ellipsoid": mujoco.mjtGeom.mjGEOM_ELLIPSOID,
}
_ALONG_X = (np.sqrt(0.5), 0.0, np.sqrt(0.5), 0.0)  # turns a capsule's axis from z to x


def add_shape(
    body: mujoco.MjsBody, shape: str, size: Sequence[float] | np.ndarray, pos: Sequence[float], **options
) -> None:
    """Add a geom: `size` are MuJoCo's half-extents (padded to three numbers), `options` any other geom attribute."""
    padded = np.zeros(3)
    padded[: len(size)] = size
    body.add_geom(type=_TYPES[shape], size=padded, pos=np.asarray(pos, dtype=float), **options)


def add_object(spec: mujoco.MjSpec, item: SceneObject) -> None:
    """Add a body named `item.name` with the shape its name tells.

    A fixed or ghost object is a mocap body (placed at reset, never moved by contact); any other has a free joint.

    Raises:
        ValueError: the name tells no known shape.
    """
    still = item.fixed or item.ghost
    body = spec.worldbody.add_body(name=item.name, mocap=still)
    if not still:
        body.add_freejoint(name=item.name)
    build = next((build for word, build in _BUILDERS.items() if word in item.name), None)
    if build is None:
        raise ValueError(f"an object's name must contain one of {sorted(_BUILDERS)}, got {item.name!r}")
    count = len(body.geoms)
    build(body, np.asarray(item.size) / 2, item)
    for i, geom in enumerate(body.geoms[count:]):
        geom.name = f"{item.name}/{i}"
        if item.ghost:
            geom.contype = geom.conaffinity = 0


def _paint(color: Sequence[float], shade: float = 1.0) -> tuple[float, float, float, float]:
    r, g, b = np.clip(np.asarray(color) * shade, 0, 1)
    return float(r), float(g), float(b), 1.0


def _solid(item: SceneObject, contacts: dict, shade: float = 1.0) -> dict:
    return contacts | {"density": item.density, "rgba": _paint(item.color, shade)}


def _block(body: mujoco.MjsBody, half: np.ndarray, item: SceneObject) -> None:
    add_shape(body, "box", half, (0, 0, 0), **_solid(item, OBJECT_CONTACTS))


def _can(body: mujoco.MjsBody, half: np.ndarray, item: SceneObject) -> None:
    add_shape(body, "cylinder", (half[0], half[2]), (0, 0, 0), **_solid(item, ROUND_CONTACTS))


def _spoon(body: mujoco.MjsBody, half: np.ndarray, item: SceneObject) -> None:
    """A flat handle towards -x that the fingers can hold, and a bowl at +x."""
    hx, hy, hz = half
    bowl = 0.36 * hx
    handle_half = (hx - bowl * 0.6) * 1.0
    add_shape(
        body,
        "box",
        (handle_half, 0.008, 0.65 * hz),
        (-hx + handle_half, 0, -0.35 * hz),
        **_solid(item, OBJECT_CONTACTS),
    )
    add_shape(body, "ellipsoid", (bowl, hy, hz), (hx - bowl, 0, 0), **_solid(item, ROUND_CONTACTS))
    inside = VISUAL | {"rgba": _paint(item.color, 0.55)}
    add_shape(body, "ellipsoid", (0.72 * bowl, 0.72 * hy, 0.5 * hz), (hx - bowl, 0, 0.62 * hz), **inside)


def _carrot(body: mujoco.MjsBody, half: np.ndarray, item: SceneObject) -> None:
    """Tapering orange capsules on a common ground line, green leaves at the thick end (+x)."""
    hx, hy, hz = half
    for radius, left, right in ((1.0, -0.18, 0.55), (0.82, -0.5, 0.0), (0.60, -0.80, -0.3)):
        r = radius * hy
        length, centre = (right - left) * hx / 2, (right + left) * hx / 2
        options = _solid(item, ROUND_CONTACTS, 0.9 + 0.1 * radius) | {"quat": _ALONG_X}
        add_shape(body, "capsule", (r, length), (centre, 0, -hz + r), **options)
    leaf = VISUAL | {"rgba": (0.16, 0.55, 0.14, 1.0)}
    for dy, dz in ((0.0, 0.15), (0.5, -0.1), (-0.5, -0.1)):
        add_shape(body, "ellipsoid", (0.16 * hx, 0.3 * hy, 0.3 * hz), (0.82 * hx, dy * hy, dz * hz), **leaf)


def _eggplant(body: mujoco.MjsBody, half: np.ndarray, item: SceneObject) -> None:
    """A thick purple end (+x), a slimmer neck and a green cap (-x)."""
    hx, hy, hz = half
    for r, left, right in ((hy, 0.0, hx - hy), (0.8 * hy, -0.45 * hx, 0.1 * hx)):
        options = _solid(item, ROUND_CONTACTS) | {"quat": _ALONG_X}
        add_shape(body, "capsule", (r, (right - left) / 2), ((left + right) / 2, 0, -hz + r), **options)
    cap = VISUAL | {"rgba": (0.25, 0.50, 0.15, 1.0)}
    add_shape(body, "ellipsoid", (0.2 * hx, 0.72 * hy, 0.72 * hz), (-0.78 * hx, 0, -0.2 * hz), **cap)


def _plate(body: mujoco.MjsBody, half: np.ndarray, item: SceneObject) -> None:
    radius, hz = half[0], half[2]
    add_shape(body, "cylinder", (radius, hz), (0, 0, 0), **_solid(item, OBJECT_CONTACTS))
    well = VISUAL | {"rgba": _paint(item.color, 0.78)}
    add_shape(body, "cylinder", (0.7 * radius, hz), (0, 0, 0.0006), **well)


def _towel(body: mujoco.MjsBody, half: np.ndarray, item: SceneObject) -> None:
    add_shape(body, "box", half, (0, 0, 0), **_solid(item, OBJECT_CONTACTS))
    stripe = VISUAL | {"rgba": _paint(np.minimum(1.0, 0.45 + 0.7 * np.asarray(item.color)))}
    for side in (-0.72, 0.72):
        add_shape(body, "box", (0.07 * half[0], 1.002 * half[1], half[2]), (side * half[0], 0, 0.0005), **stripe)


def _basket(body: mujoco.MjsBody, half: np.ndarray, item: SceneObject) -> None:
    """An open box with a raised floor, as its task describes it."""
    hx, hy, hz = half
    floor, wall = BASKET_FLOOR_HEIGHT / 2, BASKET_WALL / 2
    add_shape(body, "box", (hx, hy, floor), (0, 0, floor - hz), **_solid(item, OBJECT_CONTACTS, 0.8))
    for sx, sy, dx, dy in (
        (wall, hy, -hx + wall, 0),
        (wall, hy, hx - wall, 0),
        (hx, wall, 0, -hy + wall),
        (hx, wall, 0, hy - wall),
    ):
        add_shape(body, "box", (sx, sy, hz), (dx, dy, 0), **_solid(item, OBJECT_CONTACTS))


def _marker(body: mujoco.MjsBody, half: np.ndarray, item: SceneObject) -> None:
    """A bright ball on a thin stalk that reaches far down: its foot shows where over the table it hovers."""
    add_shape(body, "sphere", (half[0],), (0, 0, 0), **_solid(item, VISUAL))
    stalk = _solid(item, VISUAL, 0.8)
    add_shape(body, "cylinder", (0.0018, 0.25), (0, 0, -0.25), **stalk)


def _disc(body: mujoco.MjsBody, half: np.ndarray, item: SceneObject) -> None:
    add_shape(body, "cylinder", (half[0], half[2]), (0, 0, 0), **_solid(item, VISUAL))
    add_shape(
        body, "cylinder", (0.7 * half[0], half[2]), (0, 0, 0.0006), **(VISUAL | {"rgba": (0.95, 0.95, 0.95, 1.0)})
    )
    add_shape(body, "cylinder", (0.4 * half[0], half[2]), (0, 0, 0.0012), **_solid(item, VISUAL))


_BUILDERS: dict[str, Callable[[mujoco.MjsBody, np.ndarray, SceneObject], None]] = {
    "marker": _marker,
    "disc": _disc,
    "spoon": _spoon,
    "carrot": _carrot,
    "eggplant": _eggplant,
    "plate": _plate,
    "towel": _towel,
    "basket": _basket,
    "cube": _block,
    "block": _block,
    "can": _can,
}
"""Word in an object's name -> what builds it; the first that occurs wins."""
