"""A tracker of a run that a test drives."""

from pathlib import Path

from trainer.config.sections import TrackingConfig
from trainer.tracking.tracker import Tracker, open_tracker


def opened(run: Path, uri: str | None, *, last_step: int | None = None, flush_timeout_s: float = 60) -> Tracker:
    return open_tracker(
        TrackingConfig(uri=uri, flush_timeout_s=flush_timeout_s),
        run,
        params={"training.r1_gamma": 0.05},
        config_yaml="training:\n  r1_gamma: 0.05\n",
        tags={"index_sha256": "digest"},
        run_name="name",
        last_step=last_step,
    )
