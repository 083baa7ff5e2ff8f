"""A file whose content is taken over anew when it changes: secrets, keys."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from nearfield.core.errors import BadRequest

Content = TypeVar("Content")


class WatchedFile(Generic[Content]):
    """What a file holds. One that cannot be used any more changes nothing.

    Attributes:
        content: as it was last read.
    """

    def __init__(self, path: Path, read: Callable[[Path], Content], log: logging.Logger) -> None:
        """
        Args:
            log: told what is wrong with a file that cannot be used any more.

        Raises:
            BadRequest: the file cannot be used.
        """
        self._path = path
        self._read = read
        self._log = log
        self._seen = self._stamp()
        self.content = read(path)

    def refresh(self) -> Content:
        """The content, read again if the file has changed."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            try:
                self.content = self._read(self._path)
            except BadRequest as error:
                self._log.error("what was read before still counts: %s", error.message)
        return self.content

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size
