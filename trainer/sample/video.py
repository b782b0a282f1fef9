"""Writes frames as an .mp4 file, by PyAV; the only file that imports it."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.storage.errors import UserError

CODEC = "libx264"
QUALITY = {"crf": "14", "preset": "slow"}
"""Differences from the frames that are hard to see; every player and browser shows it."""


def check_video() -> None:
    """Refuse to write a video without PyAV; call it before any work is done."""
    if find_spec("av") is None:
        raise UserError("an .mp4 file is written by av, which this Python does not have: pip install '.[video]'")


def save_video(path: Path, frames: npt.NDArray[np.uint8], fps: int) -> None:
    """Write frames as H.264 with half of the resolution in colour, which most players need.

    Args:
        path: of the file.
        frames: uint8 [N, H, W, 3], H and W even, N > 0.
        fps: frames per second.
    """
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(CODEC, rate=fps, options=QUALITY)
        _, stream.height, stream.width, _ = frames.shape
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
