"""/v1/media: images that are sent once and then named. /v1/cache: what an administrator does with the embeddings."""

import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from common.errors import InvalidRequestError
from llm_service.api.door import context_of
from llm_service.media import MediaLibrary, MediaStatus
from llm_service.server import LLMServer

FRAME = "application/vnd.fovea.embedding"

_MAX_TTL_S = 10 * 365 * 24 * 3600
_FIELDS = ("prewarm", "ttl", "pin")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_DIGEST = re.compile(r"[0-9a-f]{64}")


def create_router(library: MediaLibrary) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/media")
    async def add(http: Request) -> JSONResponse:
        source, fields = await _read_upload(http)
        status = await library.add(
            source,
            tenant=context_of(http).tenant,
            ttl_s=_seconds(fields.get("ttl"), "ttl"),
            pin=_boolean(fields.get("pin"), "pin"),
            prewarm=_boolean(fields.get("prewarm"), "prewarm") or False,
        )
        return JSONResponse(media_object(status))

    @router.get("/v1/media")
    async def media(
        http: Request,
        after: Annotated[str, Query(max_length=128)] = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> dict[str, Any]:
        found, has_more = await library.page(after, limit, context_of(http).tenant)
        return {"object": "list", "data": [media_object(status) for status in found], "has_more": has_more}

    @router.get("/v1/media/{media_id}")
    async def show(media_id: str, http: Request) -> dict[str, Any]:
        return media_object(await library.show(media_id, context_of(http).tenant))

    @router.delete("/v1/media/{media_id}")
    async def delete(media_id: str, http: Request) -> dict[str, Any]:
        await library.delete(media_id, context_of(http).tenant)
        return {"id": media_id, "object": "media.deleted", "deleted": True}

    return router


def create_admin_router(server: LLMServer) -> APIRouter:
    library = server.media
    router = APIRouter()

    @router.get("/v1/cache")
    async def stats() -> dict[str, Any]:
        return {"object": "cache", **server.cache_report(), "media": await library.report()}

    @router.delete("/v1/cache")
    async def purge() -> dict[str, Any]:
        return {"object": "cache.purged", "entries": await library.purge()}

    @router.get("/v1/cache/images/{digest}")
    async def look_up(digest: str, http: Request) -> dict[str, Any]:
        if not _DIGEST.fullmatch(digest):
            raise InvalidRequestError("the digest must be BLAKE3, 64 hex digits", param="digest")
        return {"blake3": digest, "tiers": await library.tiers_of_image(digest, context_of(http).tenant)}

    @router.post("/v1/cache/images")
    async def warm(http: Request) -> dict[str, Any]:
        found = await library.warm(await http.body(), context_of(http).tenant)
        return {"tokens": found.embedding.num_tokens, "source": found.source}

    @router.get("/v1/cache/embeddings")
    async def export(http: Request) -> StreamingResponse:
        return StreamingResponse(_frames(library, await library.keys(context_of(http).tenant)), media_type=FRAME)

    @router.post("/v1/cache/embeddings")
    async def import_frame(http: Request, key: Annotated[str, Query(max_length=1024)]) -> dict[str, Any]:
        await library.import_frame(key, await http.body(), context_of(http).tenant)
        return {"key": key, "imported": True}

    return router


def media_object(status: MediaStatus) -> dict[str, Any]:
    record = status.record
    return {
        "id": record.id,
        "object": "media",
        "blake3": record.mm_hash,
        "bytes": record.num_bytes,
        "width": record.width,
        "height": record.height,
        "format": record.format.lower(),
        "tokens": status.num_tokens,
        "grid": list(status.grid_thw),
        "tiers": status.tiers,
        "created": int(record.created),
        "expires": None if record.expires is None else int(record.expires),
        "pinned": record.pinned,
    }


async def _frames(library: MediaLibrary, keys: list[str]) -> AsyncIterator[bytes]:
    """Length and key, length and frame of each entry that is there and sound; lengths are u64, little endian."""
    for key in keys:
        frame = await library.export(key)
        if frame is not None:
            name = key.encode()
            yield len(name).to_bytes(8, "little") + name + len(frame).to_bytes(8, "little") + bytes(frame)


async def _read_upload(http: Request) -> tuple[bytes, dict[str, str]]:
    """The image and the fields beside it, which may be in the query or in the form."""
    fields = dict(http.query_params)
    if http.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        try:
            async with http.form(max_files=1, max_fields=len(_FIELDS)) as form:
                file = form.get("file")
                if not isinstance(file, UploadFile):
                    raise InvalidRequestError("the form must have a file named 'file'", param="file")
                source = await file.read()
                fields |= {name: value for name, value in form.items() if isinstance(value, str)}
        except (HTTPException, MultiPartException) as exc:
            raise InvalidRequestError(
                "the body is not a valid form with one 'file' and at most the fields prewarm, ttl and pin", param="file"
            ) from exc
    else:
        source = await http.body()
    unknown = sorted(fields.keys() - set(_FIELDS))
    if unknown:
        raise InvalidRequestError(
            f"the fields {unknown} are not known; known are {list(_FIELDS)}", param=unknown[0][:64]
        )
    return source, fields


def _boolean(text: str | None, field: str) -> bool | None:
    if text is None:
        return None
    if text.lower() not in _BOOLEANS:
        raise InvalidRequestError(f"{field} must be true or false, not {text[:64]!r}", param=field)
    return _BOOLEANS[text.lower()]


def _seconds(text: str | None, field: str) -> float | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:16]) <= _MAX_TTL_S):
        raise InvalidRequestError(f"{field} must be whole seconds from 1 to {_MAX_TTL_S}", param=field)
    return float(text)
