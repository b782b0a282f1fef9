"""Which run on the server a run directory reports to.

The run has a random id of its own, in the spool. `tracking/identity.json` binds it to the place of the directory, so
that a copy is told from the original.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.storage.files import replaced
from trainer.config.resume import rule_for
from trainer.tracking.spool import OPENING, Record, Spool, read_records, spool_path

SHAPE_CURVES = {"training.total_images"}
"""Settings that a resumed run may change, and that change its curves."""


def bind(run_directory: Path, uid: str) -> None:
    """Note that the run `uid` lies in this directory.

    Raises:
        OSError: the note cannot be written.
    """
    with replaced(_path(run_directory)) as draft:
        draft.write_text(json.dumps({"uid": uid, "directory": str(run_directory)}), encoding="utf-8")


def original_of(run_directory: Path, uid: str) -> Path | None:
    """The directory that this one was copied from, if it still holds the run `uid`; None if there is none.

    A directory that was moved has left no other; one that was restored from a backup is where it was.
    """
    noted = _read(run_directory)
    if noted.get("uid") != uid or not isinstance(noted.get("directory"), str):
        return None
    other = Path(noted["directory"])
    try:
        if other.samefile(run_directory):
            return None
    except (OSError, ValueError):
        return None
    return other if _read(other).get("uid") == uid else None


def reason_for_new_run(
    run_directory: Path,
    spool: Spool,
    *,
    last_step: int | None,
    experiment: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> str | None:
    """Why this start must report to a new run on the server, in words; None if it continues the former one.

    Args:
        run_directory: absolute path of the run's folder.
        spool: its spool, before this start is recorded in it.
        last_step: step of the checkpoint that the run resumes from, or None.
        experiment: the experiment that the user wants.
        params: the config, flat, as it will be recorded.
        tags: the origin of the run, as it will be recorded.
    """
    former = spool.former
    if former is None:
        return None
    if original := original_of(run_directory, spool.uid):
        return f"{run_directory} is a copy of {original}, which keeps its run"
    if experiment != (known := former.payload.get("experiment", experiment)):
        return (
            f"tracking.experiment is {experiment}, and the former run is in {known}, from which MLflow cannot move it"
        )
    changed = _changed(former, params, tags, restarted=last_step is None)
    if changed and (last_step is None or spool.is_ahead):
        names = ", ".join(changed[:5])
        if last_step is None:
            what = f"there is no checkpoint, and the settings differ from those of the start before ({names})"
        else:
            what = f"steps after {last_step} were reported before with other settings ({names})"
        return f"{what}: the curves would not be those of one run"
    return None


def begin_new_run(run_directory: Path) -> None:
    """Let all that a run has reported go to a new run on the server. No process may be training in the directory.

    Raises:
        OSError: the spool cannot be written.
        ValueError: the spool does not say of which run it is.
    """
    records = list(read_records(spool_path(run_directory)))
    last_step = max((record.step for record in records if record.step is not None), default=0)
    spool = Spool(run_directory, last_step=last_step)
    if spool.former is None:
        raise ValueError(f"{spool.path} has no open record")
    payload = {key: value for key, value in spool.former.payload.items() if key in OPENING}
    spool.begin_new_run()
    bind(run_directory, spool.uid)
    spool.open(step=last_step, run_id=None, **payload)
    if records[-1].kind == "close":
        spool.close(records[-1].payload["status"])


def _changed(former: Record, params: Mapping[str, str], tags: Mapping[str, str], *, restarted: bool) -> list[str]:
    """Settings, or `the data`, that differ from those of the former start and change the curves."""
    known: Mapping[str, Any] = former.payload.get("params", {})
    changed = [key for key, value in params.items() if key in known and known[key] != value]
    changed = [key for key in changed if _shapes_curves(key, restarted=restarted)]
    digest = former.payload.get("tags", {}).get("index_sha256")
    if restarted and digest not in (None, tags.get("index_sha256")):
        changed.append("the data")
    return changed


def _shapes_curves(key: str, *, restarted: bool) -> bool:
    if key in SHAPE_CURVES or (restarted and key.startswith("run.init_from")):
        return True
    try:
        return not rule_for(key).may_change
    except KeyError:
        return False


def _path(run_directory: Path) -> Path:
    return run_directory / "tracking" / "identity.json"


def _read(run_directory: Path) -> Mapping[str, Any]:
    try:
        noted = json.loads(_path(run_directory).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return noted if isinstance(noted, dict) else {}
