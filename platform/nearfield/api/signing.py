"""HMAC-SHA256 at a third of the usual cost, and files that only their owner may read."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from nearfield.core.errors import BadRequest

_BLOCK_BYTES = 64
MIN_SECRET_BYTES = 32
MAX_FILE_BYTES = 64 * 2**20


class Mac:
    """HMAC-SHA256 (RFC 2104) under one key, whose part of the hash is computed once.

    `hmac.digest` looks the algorithm up at every call; this copies two prepared states.
    """

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes, domain: bytes = b"") -> None:
        """
        Args:
            domain: stands in front of every message, so that what is signed for one purpose is
                worth nothing for another.

        Raises:
            ValueError: the key is too short to be one.
        """
        if len(key) < MIN_SECRET_BYTES:
            raise ValueError(f"a secret needs at least {MIN_SECRET_BYTES} bytes, not {len(key)}")
        if len(key) > _BLOCK_BYTES:
            key = hashlib.sha256(key).digest()
        block = key.ljust(_BLOCK_BYTES, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block) + domain)
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def __call__(self, message: bytes) -> bytes:
        inner = self._inner.copy()
        inner.update(message)
        outer = self._outer.copy()
        outer.update(inner.digest())
        return outer.digest()


def read_private(path: Path, what: str) -> bytes:
    """The content of a file with secrets.

    Args:
        what: what the file is, for the error: "passport keys".

    Raises:
        BadRequest: there is none, or others than its owner may read it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise BadRequest(
                    f"The file with the {what} can be read by others (mode {mode:04o}): "
                    f"chmod 600 {path}"
                )
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadRequest(f"The file with the {what} cannot be read: {error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise BadRequest(f"The file with the {what} is larger than {MAX_FILE_BYTES} bytes: {path}")
    return content


def read_private_json(path: Path, what: str) -> Any:
    """Likewise, parsed.

    Raises:
        BadRequest: also if it is no JSON.
    """
    try:
        return json.loads(read_private(path, what))
    except ValueError:
        raise BadRequest(f"The file with the {what} is not JSON: {path}") from None


def write_private(path: Path, content: bytes) -> None:
    """Write a file only its owner can read: all of it or nothing, also for whoever reads it now.

    Raises:
        OSError: it cannot be written.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
