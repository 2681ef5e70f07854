"""Build the twin's MuJoCo model: the arm, a table or a sink, the task's objects, lights and the cameras."""

import numpy as np

from envs.mujoco_arm import ARM_XML
from envs.mujoco_gl import mujoco
from envs.mujoco_objects import OBJECT_CONTACTS, add_object, add_shape
from tasks.camera import CAMERAS, THIRD_PERSON, WRIST, WRIST_CAMERA, Camera
from tasks.put_eggplant_in_basket import SINK_CENTER, SINK_SIZE
from tasks.task import SceneObject

TIMESTEP = 0.004  # s; 50 steps a control step
DISTRACTORS = (
    SceneObject("distractor_can", (0.045, 0.045, 0.06), 300.0, (0.75, 0.75, 0.78)),
    SceneObject("distractor_block", (0.04, 0.025, 0.025), 500.0, (0.85, 0.35, 0.6)),
)
FREE_CAMERA = "free"
"""Name of a camera that rendering puts wherever one is wanted."""
_PIXEL = 1e-5  # m; only the ratio of sensor size to focal length counts
TABLE_MATERIALS = ("oak", "walnut", "laminate", "slate")
_SURFACES = {  # material: texture colours dark and light, contrast of the grain
    "oak": ((0.66, 0.52, 0.38), (0.90, 0.78, 0.62), 1.0),
    "walnut": ((0.34, 0.23, 0.16), (0.50, 0.36, 0.25), 1.0),
    "laminate": ((0.80, 0.80, 0.78), (0.86, 0.86, 0.84), 0.5),
    "slate": ((0.36, 0.40, 0.43), (0.44, 0.48, 0.51), 0.5),
}
_TEXTURE_SIZE = 256
KEY_LIGHT = (0.17, -0.26, -1.0)
"""Direction of the light that casts shadows: steep, so that the gripper's shadow tells where over the table it is."""


def build_model(scene: str, objects: tuple[SceneObject, ...]) -> mujoco.MjModel:
    """Compile the scene.

    Args:
        scene: "table" or "sink".
        objects: what stands in it, distractors included. Each becomes a body of its name, a `fixed` or `ghost` one a
            mocap body.

    Raises:
        ValueError: unknown scene, or an object's shape is unknown.
    """
    if scene not in CAMERAS:
        raise ValueError(f"scene must be one of {sorted(CAMERAS)}, got {scene!r}")
    spec = mujoco.MjSpec.from_file(str(ARM_XML))
    _set_options(spec)
    for material in TABLE_MATERIALS:
        _add_surface(spec, material)
    for name, rgba in {
        "wall": (0.80, 0.82, 0.83, 1),
        "floor": (0.42, 0.40, 0.39, 1),
        "steel": (0.62, 0.65, 0.68, 1),
    }.items():
        spec.add_material(name=name, rgba=rgba, specular=0.15, shininess=0.2)
    _add_room(spec.worldbody)
    if scene == "table":
        add_shape(
            spec.worldbody,
            "box",
            (0.55, 0.75, 0.02),
            (0.30, 0.0, -0.02),
            name="table",
            material="oak",
            **OBJECT_CONTACTS,
        )
    else:
        _add_sink(spec.worldbody)
    _add_lights(spec.worldbody)
    _add_camera(spec.worldbody, THIRD_PERSON, CAMERAS[scene])
    _add_camera(spec.worldbody, FREE_CAMERA, CAMERAS[scene])
    _add_camera(spec.body("gripper_link"), WRIST, WRIST_CAMERA)
    for item in objects:
        add_object(spec, item)
    model = spec.compile()
    for material in TABLE_MATERIALS:
        _paint(model, material)
    return model


def key_light_pos(direction: np.ndarray | tuple[float, float, float]) -> np.ndarray:
    """Return where (3,) a light of this direction must stand for its shadow map to be centred on the workspace."""
    return np.array([0.28, 0.0, 0.0]) - 0.9 * np.asarray(direction)


def sensor_of(camera: Camera) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return a camera's sensor size and focal length, both (horizontal, vertical) in m, as MuJoCo has them."""
    return (camera.width * _PIXEL, camera.height * _PIXEL), (camera.focal * _PIXEL, camera.focal * _PIXEL)


def _set_options(spec: mujoco.MjSpec) -> None:
    option = spec.option
    option.timestep = TIMESTEP
    option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    option.impratio = 5.0  # stiffer friction: what is held does not creep out of the gripper
    option.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    option.iterations, option.ls_iterations = 100, 50  # cut short, the solver throws loose objects into the air
    spec.stat.center, spec.stat.extent = (0.28, 0.0, 0.05), 0.5  # the shadow map covers +-extent about the light
    quality = spec.visual.quality
    quality.shadowsize, quality.offsamples = 256, 0  # larger ones cost 3 to 10 times as much and look alike at 128 px
    quality.numslices, quality.numstacks, quality.numquads = 16, 6, 1  # a software renderer's time goes into vertices
    head = spec.visual.headlight
    head.ambient, head.diffuse, head.specular = (0.38, 0.38, 0.39), (0.27, 0.27, 0.27), (0.05, 0.05, 0.05)
    spec.visual.map.znear, spec.visual.map.zfar = 0.05, 10.0
    spec.visual.global_.offwidth = spec.visual.global_.offheight = 512


def _add_surface(spec: mujoco.MjSpec, material: str) -> None:
    """Add a table material; its texture is painted after compilation (`_paint`)."""
    spec.add_texture(
        name=material, type=mujoco.mjtTexture.mjTEXTURE_2D, builtin=mujoco.mjtBuiltin.mjBUILTIN_FLAT,
        width=_TEXTURE_SIZE, height=_TEXTURE_SIZE, rgb1=(0.5, 0.5, 0.5),
    )  # fmt: skip
    added = spec.add_material(name=material, specular=0.12, shininess=0.25, texuniform=True, texrepeat=(1.6, 1.6))
    added.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = material


def _paint(model: mujoco.MjModel, material: str) -> None:
    """Draw planks with a soft grain into a material's texture."""
    dark, light, contrast = _SURFACES[material]
    rng = np.random.default_rng(len(material))
    size = _TEXTURE_SIZE
    u, v = np.meshgrid(np.linspace(0, 1, size, endpoint=False), np.linspace(0, 1, size, endpoint=False))
    planks = 4
    plank = np.floor(v * planks).astype(int)
    phase, shade = rng.uniform(0, 2 * np.pi, (2, planks)), rng.uniform(-0.15, 0.15, planks)
    warp = np.sin(2 * np.pi * u + phase[0][plank]) + 0.5 * np.sin(2 * np.pi * (3 * u + v) + phase[1][plank])
    grain = 0.55 + 0.16 * np.sin(2 * np.pi * 16 * v + 0.8 * warp + phase[1][plank]) + shade[plank]
    seam = np.minimum((v * planks) % 1.0, 1 - (v * planks) % 1.0) < 0.012
    level = 0.5 + contrast * (grain - 0.5) - 0.4 * contrast * seam
    pixels = np.array(dark) + np.clip(level, 0, 1)[..., None] * (np.array(light) - np.array(dark))
    texture = model.tex(material).id
    start = model.tex_adr[texture]
    model.tex_data[start : start + pixels.size] = np.clip(255 * pixels, 0, 255).astype(np.uint8).ravel()


def _add_room(world: mujoco.MjsBody) -> None:
    """Floor and two walls behind the table: scenery without collisions."""
    scenery = {"contype": 0, "conaffinity": 0}
    add_shape(world, "box", (3.0, 3.0, 0.01), (0.5, 0.0, -0.76), material="floor", **scenery)
    add_shape(world, "box", (0.02, 3.0, 1.5), (1.25, 0.0, 0.0), material="wall", **scenery)
    add_shape(world, "box", (3.0, 0.02, 1.5), (0.5, 1.25, 0.0), material="wall", **scenery)


def _add_sink(world: mujoco.MjsBody) -> None:
    """A steel basin whose floor is z = 0, sunk into an oak counter."""
    half, centre, depth = np.array(SINK_SIZE[:2]) / 2, np.array(SINK_CENTER), SINK_SIZE[2]
    add_shape(world, "box", (*half, 0.02), (*centre, -0.02), name="table", material="steel", **OBJECT_CONTACTS)
    outer_low, outer_high = np.array([-0.25, -0.75]), np.array([0.85, 0.75])
    low, high = centre - half, centre + half
    spans = [  # counter slabs around the hole: x from, x to, y from, y to
        (outer_low[0], low[0], outer_low[1], outer_high[1]),
        (high[0], outer_high[0], outer_low[1], outer_high[1]),
        (low[0], high[0], outer_low[1], low[1]),
        (low[0], high[0], high[1], outer_high[1]),
    ]
    for i, (x0, x1, y0, y1) in enumerate(spans):
        size, pos = ((x1 - x0) / 2, (y1 - y0) / 2, depth / 2), ((x0 + x1) / 2, (y0 + y1) / 2, depth / 2)
        add_shape(world, "box", size, pos, name=f"counter{i}", material="oak", **OBJECT_CONTACTS)
    rim = 0.006  # steel lining over the cut edges of the counter
    edges = [
        ((rim, half[1]), (-half[0], 0)),
        ((rim, half[1]), (half[0], 0)),
        ((half[0], rim), (0, -half[1])),
        ((half[0], rim), (0, half[1])),
    ]
    for i, ((sx, sy), (dx, dy)) in enumerate(edges):
        pos = (centre[0] + dx, centre[1] + dy, depth / 2 + 0.001)
        add_shape(world, "box", (sx, sy, depth / 2), pos, name=f"lining{i}", material="steel", **OBJECT_CONTACTS)


def _add_lights(world: mujoco.MjsBody) -> None:
    world.add_light(
        name="key", type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, castshadow=True, dir=KEY_LIGHT,
        pos=key_light_pos(KEY_LIGHT), diffuse=(0.40, 0.39, 0.37), specular=(0.20, 0.20, 0.20),
    )  # fmt: skip
    world.add_light(
        name="fill", type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, castshadow=False, dir=(-0.5, 0.6, -0.6),
        pos=(0.8, -0.5, 1.0), diffuse=(0.14, 0.15, 0.17), specular=(0.0, 0.0, 0.0),
    )  # fmt: skip


def _add_camera(body: mujoco.MjsBody, name: str, camera: Camera) -> None:
    """Add a camera whose pose is given in the body's frame; the sensor is 4:3, so that a square image squashes."""
    right, down, forward = camera.rotation.T
    quat = np.zeros(4)
    mujoco.mju_mat2Quat(quat, np.stack([right, -down, -forward], axis=1).ravel())  # MuJoCo looks along its -z, y up
    sensor_size, focal_length = sensor_of(camera)
    body.add_camera(
        name=name, pos=camera.position, quat=quat, resolution=(1, 1), sensor_size=sensor_size, focal_length=focal_length
    )
