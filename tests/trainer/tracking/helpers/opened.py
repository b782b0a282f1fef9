"""A tracker of a run that a test drives."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trainer.config.sections import TrackingConfig
from trainer.tracking.tracker import Tracker, UploaderProcess, open_tracker


def opened(
    run: Path,
    uri: str | None,
    *,
    backends: Sequence[str] = ("mlflow",),
    experiment: str = "ddgan",
    params: Mapping[str, object] | None = None,
    digest: str = "digest",
    run_id: str | None = None,
    last_step: int | None = None,
    flush_timeout_s: float = 60,
    uploader: Callable[[Path, str, str, float], UploaderProcess] = UploaderProcess,
    watch_s: float = 30,
) -> Tracker:
    # Another backend than the config knows is how a test brings a sink of its own.
    config = TrackingConfig(backends=backends, uri=uri, experiment=experiment, flush_timeout_s=flush_timeout_s)  # pyright: ignore[reportArgumentType]
    return open_tracker(
        config,
        run,
        params={"training.r1_gamma": 0.05, "tracking.uri": str(uri), **(params or {})},
        config_yaml=f"tracking:\n  uri: {uri}\n",
        tags={"index_sha256": digest},
        run_name="name",
        last_step=last_step,
        run_id=run_id,
        uploader=uploader,
        watch_s=watch_s,
    )
