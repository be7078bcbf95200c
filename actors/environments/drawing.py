"""From a figure to the numbers of its picture, for environments that draw themselves."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def pixels(figure: Figure) -> np.ndarray:
    """What it looks like, [H, W, 3] uint8."""
    # Not by pyplot, which keeps every figure and chooses a backend by the display.
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
