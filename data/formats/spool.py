"""The images of a table in a file without a name, which any process of this host reads at any place.

A table gives one image only with the many around it, but images are prepared in shuffled order. So all are copied once,
as they are. The file has no name: however the processes end, nothing is left on the disk.
"""

import os
import tempfile
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from data.formats.tables import Cell

_ABSENT, _CONTENT, _PATH = 0, 1, 2
_ENTRY = 3
"""Numbers of each image: kind, offset, size."""
_NUMBER_BYTES = 8


class Place(NamedTuple):
    """Where another process finds a spool."""

    file: str
    index_offset: int
    num_cells: int


def spool_folder() -> Path:
    """Where it takes room: $TMPDIR, by default /var/tmp, which is a disk where /tmp may be memory."""
    default = Path("/var/tmp")
    return Path(tempfile.gettempdir()) if os.environ.get("TMPDIR") or not default.is_dir() else default


class Spool:
    """Numbered cells of a column."""

    def __init__(self, descriptor: int, place: Place) -> None:
        self._descriptor = descriptor
        self.place = place
        """For other processes, as long as the one that wrote it lives."""

    @classmethod
    def write(cls, cells: Iterable[Cell]) -> "Spool":
        """Copy cells.

        Raises:
            OSError: the disk is full.
            TableError: what the table raises.
        """
        descriptor = -1
        try:
            with tempfile.TemporaryFile(dir=spool_folder()) as stream:
                index, offset = array("q"), 0
                for content, path in cells:
                    kind = _ABSENT if content is None and path is None else _PATH if content is None else _CONTENT
                    stored = (path or "").encode("utf-8", "surrogateescape") if content is None else content
                    index.extend((kind, offset, len(stored)))
                    stream.write(stored)
                    offset += len(stored)
                stream.write(index.tobytes())
                stream.flush()
                descriptor = os.dup(stream.fileno())
        except BaseException:
            if descriptor >= 0:
                os.close(descriptor)
            raise
        return cls(descriptor, Place(f"/proc/{os.getpid()}/fd/{descriptor}", offset, len(index) // _ENTRY))

    @classmethod
    def open(cls, place: Place) -> "Spool":
        """Open the spool of another process of this host.

        Raises:
            OSError: that process has ended, or runs elsewhere.
        """
        return cls(os.open(place.file, os.O_RDONLY | os.O_CLOEXEC), place)

    def read(self, number: int) -> Cell:
        """A cell, 0 .. num_cells - 1.

        Raises:
            OSError: the disk cannot be read.
        """
        entry = os.pread(
            self._descriptor, _ENTRY * _NUMBER_BYTES, self.place.index_offset + number * _ENTRY * _NUMBER_BYTES
        )
        kind, offset, size = array("q", entry)
        if kind == _ABSENT:
            return Cell(None, None)
        stored = os.pread(self._descriptor, size, offset)
        return Cell(None, stored.decode("utf-8", "surrogateescape")) if kind == _PATH else Cell(stored, None)

    def __del__(self) -> None:
        os.close(self._descriptor)
