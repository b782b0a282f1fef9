"""Records of submitted runs, for `status`, `logs` and `stop`: one small file per run.

The files are in runs/launches of the checkout, or in the folder DDGAN_LAUNCHES.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.request import ROOT, name_of
from data.storage.files import replaced, timestamp
from trainer.config.draft import ConfigError

FOLDER = Path(os.environ.get("DDGAN_LAUNCHES") or ROOT / "runs" / "launches")


@dataclass(frozen=True)
class Record:
    """The last submission of a run. It holds no secrets.

    Attributes:
        name: the run's name, as given by `request.name_of`.
        way: slurm, ray, kubernetes or local.
        directory: the run directory, as the run sees it.
        job: the scheduler's id of the job.
        place: address or namespace of the scheduler; empty if there is only one.
        log: the job's log file, with the scheduler's placeholders; empty: ask the scheduler for logs.
        submitted: time in UTC.
    """

    name: str
    way: str
    directory: str
    job: str
    place: str = ""
    log: str = ""
    submitted: str = ""

    def save(self) -> None:
        """Write it, readable by its owner only."""
        FOLDER.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = FOLDER / f"{self.name}.json"
        content = json.dumps(asdict(self) | {"submitted": timestamp()}, indent=2) + "\n"
        with replaced(file) as draft:
            draft.touch(mode=0o600)
            draft.write_text(content)


def last_of(name: str) -> Record | None:
    """The last submission of the run with this name, or None."""
    try:
        return Record(**json.loads((FOLDER / f"{name}.json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError([f"{FOLDER / name}.json cannot be read: {error}. Remove it, and submit again"]) from error


def find(run: str) -> Record | None:
    """Find a submission by name, by run directory, or by the last part of a run directory if that is unique.

    Raises:
        ConfigError: more than one run directory ends in that part.
    """
    if "/" not in run and (found := last_of(run)):
        return found
    if found := last_of(name_of(run)):
        return found
    records = [last_of(file.stem) for file in sorted(FOLDER.glob("*.json"))]
    matching = [record for record in records if record and Path(record.directory).name == run]
    if len(matching) > 1:
        names = ", ".join(record.name for record in matching)
        raise ConfigError([f"{run} is the name of {len(matching)} runs: give one of {names}"])
    return matching[0] if matching else None


def known() -> list[str]:
    """Names of all submissions."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))
