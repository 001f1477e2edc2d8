"""The base model at a site: found on its disk, or fetched from the server once.

`base.digest` in the federation's configuration, to which the site agrees, says which files they
are. Nothing else is written, and nothing is used before all of it has this digest: the server
cannot give a site another model.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import TypeAdapter, ValidationError

from fedtune.base.resolve import BaseFile, digest_files, is_base_file
from fedtune.deploy.site_files import SiteFiles
from fedtune.errors import BaseModelError, ServerRefused, ServerUnreachable
from fedtune.flower.network import (
    NOT_LET_IN,
    PATIENCE_SECONDS,
    SignedTime,
    translated,
)
from fedtune.tls import tls_context

PREFIX = "/v1/base/"  # at the server, followed by the digest, and by a file's name
LARGEST_LIST = 1 << 20  # bytes
PIECE = 1 << 20
TELL_SECONDS = 10.0
PAUSE_SECONDS = 2.0
Say = Callable[[str], None]  # tells the operator of the site something
_FILES = TypeAdapter(list[BaseFile])


def fetch_base(
    files: SiteFiles, authority: bytes, key: ec.EllipticCurvePrivateKey, say: Say
) -> None:
    """Fetch the base model that `files.federation` names, if it is needed and not on this disk.

    What was begun before is gone on with. Raises `BaseModelError` or `NetworkError`.
    """
    digest = files.federation.base.digest
    if digest is None or not files.needs_base or files.has_base():
        return
    target = files.fetched_base(digest)
    begun = target.with_name(f"{digest}.part")
    server = files.config.site.server
    client = httpx.Client(
        base_url=f"https://{server}",
        verify=tls_context(authority),
        auth=SignedTime(key),
        timeout=30.0,
        headers={"accept-encoding": "identity"},  # what is hashed is what is written
    )
    with client as http:
        listed = _list(http, digest)
        size = sum(file.size for file in listed)
        say(f"the base model is not here; fetching {size / 1e6:.0f} MB of it from {server}")
        try:
            begun.mkdir(parents=True, exist_ok=True)
            there = sum(path.stat().st_size for path in begun.iterdir())
            if (free := shutil.disk_usage(begun).free) < size - there:
                raise BaseModelError(
                    f"{target.parent}: {free / 1e6:.0f} MB are free, the base model needs "
                    f"{(size - there) / 1e6:.0f} MB; machine.models can be on another disk"
                )
            progress = _Progress(say, size)
            for file in listed:
                _Download(http, f"{PREFIX}{digest}/{file.name}", file, begun, progress).run()
            begun.replace(target)
        except OSError as error:
            raise BaseModelError(
                f"{begun}: cannot be written: {error.strerror}; what is there is kept"
            ) from error
    say(f"the base model is here: {target}")


def _list(http: httpx.Client, digest: str) -> list[BaseFile]:
    """What there is to fetch, which has the digest; raises `ServerRefused`."""
    with translated(), http.stream("GET", f"{PREFIX}{digest}") as response:
        if response.status_code == httpx.codes.NOT_FOUND:
            raise ServerRefused(
                "the base model is not on this machine, and the server does not offer it: set "
                "machine.base to where it lies here, or server.offer-base at the server"
            )
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise ServerRefused(NOT_LET_IN)
        response.raise_for_status()
        text = b""
        for data in response.iter_bytes(PIECE):
            text += data
            if len(text) > LARGEST_LIST:
                raise ServerRefused("the server's list of the base model's files has no end")
    try:
        files = _FILES.validate_json(text)
        found = digest_files(files)
    except (ValidationError, ValueError) as error:
        raise ServerRefused("the server's list of the base model's files makes no sense") from error
    if found != digest:
        raise ServerRefused(
            f"the server offers a base model of digest {found}, base.digest is {digest}"
        )
    for file in files:
        if not is_base_file(file.name) or file.size < 0:
            raise ServerRefused(f"{file.name!r} is no file of a base model")
    return files


class _Progress:
    def __init__(self, say: Say, size: int) -> None:
        self._say, self._size, self._done = say, size, 0
        self._told = time.monotonic()

    def add(self, length: int) -> None:
        self._done += length
        if time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            self._say(f"{self._done / 1e6:.0f} of {self._size / 1e6:.0f} MB of the base model")


class _Download:
    """One file, from where an earlier try ended."""

    def __init__(
        self, http: httpx.Client, url: str, file: BaseFile, folder: Path, progress: _Progress
    ) -> None:
        self._http, self._url, self._file, self._progress = http, url, file, progress
        self._path = folder / file.name

    def run(self) -> None:
        have = self._path.stat().st_size if self._path.exists() else 0
        self._progress.add(have)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while have < self._file.size or not self._path.exists():
            try:
                with translated():
                    self._get(have)
            except ServerUnreachable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(PAUSE_SECONDS)
            now = self._path.stat().st_size if self._path.exists() else 0
            if now > have:
                have, deadline = now, time.monotonic() + PATIENCE_SECONDS
        with self._path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self._file.sha256:
            self._path.unlink()
            raise BaseModelError(
                f"{self._file.name}: what came is not what base.digest stands for; "
                "it was removed, start again"
            )

    def _get(self, have: int) -> None:
        headers = {"range": f"bytes={have}-"} if have else {}
        with self._http.stream("GET", self._url, headers=headers) as response:
            response.raise_for_status()
            # Whoever does not know of ranges would send all of it once more.
            expected = httpx.codes.PARTIAL_CONTENT if have else httpx.codes.OK
            if response.status_code != expected:
                raise ServerRefused(f"the server answers {response.status_code} to a range")
            with self._path.open("ab") as file:
                for data in response.iter_bytes(PIECE):
                    if (have := have + len(data)) > self._file.size:
                        raise ServerRefused(f"{self._file.name}: longer than the server said")
                    file.write(data)
                    self._progress.add(len(data))
