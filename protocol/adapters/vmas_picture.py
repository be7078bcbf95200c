"""Pictures of VMAS's scenarios. VMAS itself draws with OpenGL, which a machine without a display seldom has."""

from __future__ import annotations

from typing import Any

import numpy as np

SIZE = 400
"""Pixels, of the shorter side."""
FINER = 2
"""It is drawn so much larger, and made smaller: edges are smooth then."""
LINE = 0.01
"""Thickness of a line, which has none of its own, in the scenario's units."""


def picture(scenario: Any) -> np.ndarray:
    """The world of the first copy as it is now, from above, [H, W, 3] uint8.

    As much is shown as VMAS shows: the scenario's own view, or more if agents have left that. What scenarios draw
    besides their entities is left out.
    """
    from PIL import Image, ImageDraw

    world, origin = scenario.world, np.array(scenario.render_origin, float)
    width, height = np.array(scenario.viewer_size, float) / min(scenario.viewer_size)
    reach = max(
        scenario.viewer_zoom,
        *(np.abs(_place(a) - origin).max() + 2 * a.shape.circumscribed_radius() for a in world.agents),
    )
    scale = FINER * SIZE / 2 / reach
    size = round(FINER * SIZE * width), round(FINER * SIZE * height)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for entity in world.entities:
        if not entity.is_rendering[0]:
            continue
        corners = (_outline(entity) - origin) * (scale, -scale) + np.array(size) / 2
        pen.polygon([tuple(corner) for corner in corners.tolist()], fill=_colour(entity))
    return np.asarray(image.resize((size[0] // FINER, size[1] // FINER), Image.Resampling.BOX))


def _place(entity: Any) -> np.ndarray:
    """[2]"""
    place: np.ndarray = entity.state.pos[0].cpu().numpy().astype(float)
    return place


def _outline(entity: Any) -> np.ndarray:
    """Corners [K, 2] of a circle, a box, or a line."""
    shape = entity.shape
    if hasattr(shape, "radius"):
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return _place(entity) + shape.radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    width = LINE if type(shape).__name__ == "Line" else shape.width
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (shape.length / 2, width / 2)
    turn = float(entity.state.rot[0, 0])
    return _place(entity) + corners @ np.array([(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))])


def _colour(entity: Any) -> tuple[int, ...]:
    """Red, green and blue; scenarios may give each copy its own, and transparency."""
    colour = np.array(entity.color, float)
    red_green_blue = (colour[0] if colour.ndim > 1 else colour)[:3]
    return tuple(round(255 * part) for part in red_green_blue.tolist())
