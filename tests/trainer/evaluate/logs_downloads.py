"""`trainer.evaluate`, with a line on stderr for each file of a checkpoint that is downloaded.

Not a test itself: `test_reference.py` runs it with the arguments of the command.
"""

import sys
from pathlib import Path
from typing import Any

from data.storage.writable import WritableStorage
from trainer.evaluate.command import main

_download = WritableStorage.download


def _logged(self: WritableStorage, name: str, target: Path, **how: Any) -> None:
    sys.stderr.write(f"downloads {name}\n")
    _download(self, name, target, **how)


if __name__ == "__main__":
    WritableStorage.download = _logged
    sys.exit(main())
