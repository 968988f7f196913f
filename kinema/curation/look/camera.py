"""What the camera does: a similarity transform fitted to optical flow, and its name.

A *rate* has four numbers, as seen from the camera: to the right, up, zooming in, and rolling to the
right (clockwise), each per second. The first two are fractions of the picture's longer side, zoom
is the logarithm of the scale, roll is in radians. To weigh them against each other, zoom and roll
are multiplied by the root mean square distance of a picture's points from its centre (in longer
sides): each of the four is then how far a point moves on root mean square over the picture.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]

GRID = 6
"""Pixels between the points of the flow that are fitted."""
TEXTURE = 2e-5
"""Smallest eigenvalue of the structure tensor (`cv2.cornerMinEigenVal`, 5 x 5) at which flow can be
known: sky and walls have no say."""
MIN_POINTS = 24
MIN_SHARE = 0.3
"""Share of points that a fit must explain: below, things move in ways that no camera explains."""

STILL = 0.015
"""Longer sides per second below which the camera counts as fixed."""
SHAKING = 0.25
"""Of a motion that leads nowhere, the share of the speed that changes within 1/30 s from which it
is shake: an oscillation of f Hz has 2 pi f / 30, so 0.25 is 1.2 Hz."""
STEADY = 0.5
"""Share of the speed that must be drift in one direction for a motion to have a name."""
CERTAIN = 2.0
"""Standard errors by which the mean of a shaky motion must differ from none to have a name."""
ALONE = 0.6
"""A second component of more than this share of the first makes a motion mixed."""

LABELS = (
    "static",
    "pan_left",
    "pan_right",
    "tilt_up",
    "tilt_down",
    "zoom_in",
    "zoom_out",
    "roll_left",
    "roll_right",
    "shake",
    "mixed",
)
_NAMES = (
    ("pan_right", "pan_left"),
    ("tilt_up", "tilt_down"),
    ("zoom_in", "zoom_out"),
    ("roll_right", "roll_left"),
)
_CLOCKWISE = ("pan_right", "tilt_down", "pan_left", "tilt_up")
"""Where a direction goes when the picture is turned by a quarter clockwise: to the next."""


class Fit(NamedTuple):
    """The camera's motion between two pictures."""

    moved: Floats
    """`[4]` (right, up, zoom in, roll right) from the first picture to the second."""
    share: float
    """Of the points with texture, those that the motion explains."""


def textured_points(picture: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, Any]:
    """`[P, 2]` int (x, y) of the places on a grid at which flow can be trusted."""
    strength: Any = cv2.cornerMinEigenVal(picture, 5)
    margin = GRID // 2
    rows, columns = np.nonzero(strength[margin::GRID, margin::GRID] > TEXTURE)
    return np.stack([columns, rows], 1) * GRID + margin


def fit_camera(flow: Floats, points: np.ndarray[Any, Any]) -> Fit | None:
    """The similarity transform that explains the flow of most points (RANSAC).

    Args:
        flow: `[h, w, 2]` pixels, from the first picture to the second.
        points: `[P, 2]` where to believe it.

    Returns:
        None where there are too few points, or no transform explains enough of them.
    """
    if len(points) < MIN_POINTS:
        return None
    height, width = flow.shape[:2]
    moved = flow[points[:, 1], points[:, 0]].astype(np.float64)
    # About the centre, so that shift and zoom are told apart.
    before = points - np.array([(width - 1) / 2, (height - 1) / 2])
    slack = 0.25 + 0.1 * float(np.median(np.linalg.norm(moved, axis=1)))
    matrix, inliers = cv2.estimateAffinePartial2D(
        before, before + moved, method=cv2.RANSAC, ransacReprojThreshold=slack, maxIters=500
    )
    if matrix is None:
        return None
    share = float(inliers.mean())
    if share < MIN_SHARE:
        return None
    across, along = float(matrix[0, 0]), float(matrix[1, 0])
    longer = max(height, width)
    zoom, turn = 0.5 * np.log(across**2 + along**2), np.arctan2(along, across)
    # Content goes left when the camera goes right, and down when it goes up; an angle is clockwise
    # on the screen, as y points down.
    camera = np.array([-matrix[0, 2] / longer, matrix[1, 2] / longer, zoom, -turn])
    return Fit(camera, share)


def spread(height: float, width: float) -> float:
    """Root mean square distance of a picture's points from its centre, in longer sides."""
    return float(np.sqrt((height**2 + width**2) / 12) / max(height, width))


def weighed(rates: Floats, height: float, width: float) -> Floats:
    """`[..., 4]` with zoom and roll as displacements too."""
    radius = spread(height, width)
    return rates * np.array([1.0, 1.0, radius, radius])


def name_motion(rates: Floats, shake: Floats, height: float, width: float) -> str | None:
    """The label of a clip.

    Args:
        rates: `[M, 4]` at sampled moments; NaN where the camera could not be told.
        shake: `[M]` change of displacement within 1/30 s, longer sides.
        height: of the picture, in any unit.
        width: the same.

    Returns:
        One of `LABELS`; None where the camera could not be told at most of the moments.
    """
    known = np.isfinite(rates.sum(1))
    if not len(known) or known.mean() < 0.5:
        return None
    moves = weighed(rates[known], height, width)
    speeds = np.linalg.norm(moves, axis=1)
    # The median: for a moment a thing that fills the picture may pass for the camera's motion.
    if np.median(speeds) < STILL:
        return "static"
    speed, drift = float(speeds.mean()), moves.mean(0)
    shaken = np.nanmean(shake) * 30 if np.isfinite(shake).any() else 0.0
    least = STEADY * speed
    if shaken > SHAKING * speed:
        # The mean of a few moments of trembling may well point somewhere: by how much, by chance?
        error = np.linalg.norm(moves.std(0)) / np.sqrt(max(1, len(moves) - 1))
        least = max(least, CERTAIN * float(error))
    if np.linalg.norm(drift) < least:
        return "shake" if shaken > SHAKING * speed else "mixed"
    first, second = np.argsort(-np.abs(drift))[:2]
    if abs(drift[second]) > ALONE * abs(drift[first]):
        return "mixed"
    return _NAMES[first][0 if drift[first] > 0 else 1]


def turned_label(label: str | None, rotation: int) -> str | None:
    """A label of the stored picture for the displayed one.

    Args:
        label: of `LABELS`, or None.
        rotation: clockwise degrees (0, 90, 180, 270) that turn the stored picture into the
            displayed one.
    """
    if label not in _CLOCKWISE:
        return label
    # What points right in the stored picture points down in one that is turned clockwise.
    place = _CLOCKWISE.index(label) + rotation // 90
    return _CLOCKWISE[place % 4]
