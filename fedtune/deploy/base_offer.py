"""The base model for sites that do not have it: its files, over the port that sites reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from fedtune.base.resolve import BaseFile, list_base
from fedtune.deploy.base_fetch import PREFIX


class BaseOffer:
    """The files of one base model, for whoever is let in."""

    def __init__(self, folder: Path, digest: str, let_in: Callable[[Request], bool]) -> None:
        """`let_in` says whether a request is that of a site in the roster."""
        self._folder, self._let_in = folder, let_in
        routes = [
            Route(f"{PREFIX}{digest}", self._list),
            Route(f"{PREFIX}{digest}/{{name}}", self._file),
        ]
        self.app = Starlette(routes=routes)

    @cached_property
    def _files(self) -> list[BaseFile]:
        return list_base(self._folder)  # reads all of them, so when the first site asks

    async def _list(self, request: Request) -> Response:
        await self._check(request)
        files = await run_in_threadpool(lambda: self._files)
        return JSONResponse([asdict(file) for file in files])

    async def _file(self, request: Request) -> Response:
        await self._check(request)
        name = request.path_params["name"]
        files = await run_in_threadpool(lambda: self._files)
        if name not in {file.name for file in files}:
            raise HTTPException(404)
        return FileResponse(self._folder / name, media_type="application/octet-stream")

    async def _check(self, request: Request) -> None:
        if not await run_in_threadpool(self._let_in, request):
            raise HTTPException(401)
