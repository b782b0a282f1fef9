"""What was submitted, for `status`, `logs` and `stop`: one small file per run.

They lie in runs/launches of the checkout, or where DDGAN_LAUNCHES says.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.request import ROOT, name_of
from data.storage.files import replaced, timestamp
from trainer.config.io import ConfigError

FOLDER = Path(os.environ.get("DDGAN_LAUNCHES") or ROOT / "runs" / "launches")


@dataclass(frozen=True)
class Record:
    """The last submission of a run. It holds no secret.

    Attributes:
        name: as `request.name_of`.
        way: slurm, ray, kubernetes or local.
        directory: of the run, as it sees it.
        job: what the scheduler calls it.
        place: where that scheduler is: an address, a namespace; empty if there is but one.
        log: file that it writes to, with what the scheduler puts in; empty: the scheduler is asked.
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
    """The last submission of the run of that name."""
    try:
        return Record(**json.loads((FOLDER / f"{name}.json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError([f"{FOLDER / name}.json cannot be read: {error}. Remove it and submit again"]) from error


def find(run: str) -> Record | None:
    """The submission that a user means: by name, by run directory, or by the last part of a directory if one fits.

    Raises:
        ConfigError: more than one fits.
    """
    if "/" not in run and (found := last_of(run)):
        return found
    if found := last_of(name_of(run)):
        return found
    records = [last_of(file.stem) for file in sorted(FOLDER.glob("*.json"))]
    fitting = [record for record in records if record and Path(record.directory).name == run]
    if len(fitting) > 1:
        names = ", ".join(record.name for record in fitting)
        raise ConfigError([f"{run} is the name of {len(fitting)} runs: give one of {names}"])
    return fitting[0] if fitting else None


def known() -> list[str]:
    """Names of all submissions."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))
