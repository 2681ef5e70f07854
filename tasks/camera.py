"""Cameras: pose, intrinsics, the two projections between pixels and the robot-base frame, and Bridge's fixed ones.

The published camera images 640x480 with square pixels; Bridge data squashes that frame to a square (aspect not kept),
so pixel coordinates here are fractions (u, v) of the image, u right and v down in [0, 1], whatever the resolution.

Source: BridgeData V2 camera calibration as published with SIMPLER (Li et al., CoRL 2024).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    Attributes:
        position: (x, y, z) of the optical centre, robot-base frame, m.
        forward: viewing direction, robot-base frame (any length).
        up: direction that is up in the image, robot-base frame (any length, not along `forward`).
        focal: focal length in pixels of the unsquashed image, the same in both axes.
        width: image width in unsquashed pixels.
        height: image height in unsquashed pixels.
    """

    position: tuple[float, float, float]
    forward: tuple[float, float, float]
    up: tuple[float, float, float] = (0.0, 0.0, 1.0)
    focal: float = 623.588
    width: int = 640
    height: int = 480

    @property
    def rotation(self) -> np.ndarray:
        """(3, 3) float64, columns are the image's right, down and forward axes in the base frame."""
        forward = np.asarray(self.forward, dtype=np.float64)
        forward = forward / np.linalg.norm(forward)
        right = np.cross(forward, self.up)
        right /= np.linalg.norm(right)
        return np.stack([right, np.cross(forward, right), forward], axis=1)

    @property
    def focal_uv(self) -> np.ndarray:
        """(2,) float64, focal length as fractions of the image's width and height; the optical axis is its middle."""
        return self.focal / np.array([self.width, self.height])

    def project(self, points: np.ndarray) -> np.ndarray:
        """Return (..., 2) image fractions (u, v) of (..., 3) points, m; points must lie in front of the camera."""
        local = (np.asarray(points, dtype=np.float64) - np.asarray(self.position)) @ self.rotation
        return 0.5 + local[..., :2] / local[..., 2:] * self.focal_uv

    def unproject(self, uv: np.ndarray, z: np.ndarray | float) -> np.ndarray:
        """Return (..., 3) points, m, where the rays through (..., 2) image fractions meet the horizontal plane at z.

        Rays that run parallel to the plane or away from it give points that are not finite or lie behind the camera.
        """
        uv = np.asarray(uv, dtype=np.float64)
        scale = np.array([self.width, self.height]) / self.focal
        rays = np.concatenate([(uv - 0.5) * scale, np.ones_like(uv[..., :1])], axis=-1) @ self.rotation.T
        depth = (np.asarray(z) - self.position[2]) / rays[..., 2]
        return np.asarray(self.position) + depth[..., None] * rays


THIRD_PERSON, WRIST = "third_person", "wrist"
"""Names of the scene's fixed camera and the arm's own."""

CAMERAS: dict[str, Camera] = {
    "table": Camera(position=(0.0, -0.16, 0.36), forward=(1.0, 0.553, -1.085)),
    "sink": Camera(position=(-0.003, -0.21, 0.39), forward=(0.6587, 0.2963, -0.6916)),
}
"""Scene name -> its camera."""

WRIST_CAMERA = Camera(position=(-0.01, 0.0, 0.07), forward=(1.0, 0.0, -0.25), up=(0.0, 0.0, 1.0), focal=330.0)
"""The camera on the gripper, in the frame of its link: x towards the finger tips, y to the left finger."""
