"""What `fovea media` and `fovea cache` do: requests to a running service, and the file of exported embeddings.

An export is `FVEX`, a u32 version, then for each embedding the length and the key, the length and the frame, and at
last a length of 0, the number of embeddings and the xxh3_128 of all before it. Numbers are little endian, lengths and
the count u64. Frames are those of common/embedding.py.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import httpx2
import xxhash

from common.identity import mm_hash
from deploy.client import TIMEOUT_S, ClientError, authorization, wants_key
from deploy.progress import track, waiting

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}

_MAGIC = b"FVEX" + (1).to_bytes(4, "little")
_MAX_KEY_BYTES = 1024
_MAX_FRAME_BYTES = 64 * 1024**2
_NUM_UPLOADS = 4
_PAGE = 1000


class MediaClient:
    """The media and cache endpoints of one service. Thread-safe. Raises ClientError with the service's message."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url
        self._http = httpx2.Client(base_url=url, timeout=TIMEOUT_S, headers=authorization(api_key))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def add(self, source: bytes, **fields: str) -> dict[str, Any]:
        return self._request("POST", "/v1/media", content=source, params=fields)

    def media(self) -> Iterator[dict[str, Any]]:
        """All managed media, in the order of ids."""
        after = ""
        while True:
            page = self._request("GET", "/v1/media", params={"after": after, "limit": _PAGE})
            yield from page["data"]
            if not page["has_more"] or not page["data"]:
                return
            after = page["data"][-1]["id"]

    def show(self, media_id: str) -> dict[str, Any]:
        return self._request("GET", f"/v1/media/{media_id}")

    def remove(self, media_id: str) -> None:
        self._request("DELETE", f"/v1/media/{media_id}")

    def stats(self) -> dict[str, Any]:
        return self._request("GET", "/v1/cache")

    def purge(self) -> int:
        """How many embeddings were there."""
        return int(self._request("DELETE", "/v1/cache")["entries"])

    def warm(self, source: bytes) -> str:
        """Where the embedding was: `cached` if nothing had to be sent, else as in receipts."""
        if self._request("GET", f"/v1/cache/images/{mm_hash(source)}")["tiers"]:
            return "cached"
        return str(self._request("POST", "/v1/cache/images", content=source)["source"])

    def export(self, file: Path) -> int:
        """Writes all embeddings into one file; returns how many."""
        temporary = file.with_name(file.name + ".part")
        try:
            with temporary.open("wb") as target, self._http.stream("GET", "/v1/cache/embeddings") as response:
                if response.status_code != 200:
                    raise self._error("/v1/cache", response.status_code, response.read())
                with waiting("exporting"):
                    count = write_export(target, response.iter_bytes())
            temporary.replace(file)
        except httpx2.HTTPError as exc:
            raise ClientError(f"the connection to {self._url} failed: {exc}") from exc
        except OSError as exc:
            raise ClientError(f"{file}: {exc.strerror}") from exc
        finally:
            temporary.unlink(missing_ok=True)
        return count

    def import_frame(self, key: str, frame: bytes) -> None:
        self._request("POST", "/v1/cache/embeddings", params={"key": key}, content=frame)

    def _request(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx2.HTTPError as exc:
            raise ClientError(f"no Fovea service answers at {self._url}; start one with `fovea up`") from exc
        if response.status_code != 200:
            raise self._error(path, response.status_code, response.content)
        answer: dict[str, Any] = response.json()
        return answer

    def _error(self, path: str, status: int, body: bytes) -> ClientError:
        if status == 401:
            return ClientError(wants_key(self._url))
        if path.startswith("/v1/cache") and status == 404:
            return ClientError("the service does not serve /v1/cache; set cache.admin_api in its configuration")
        try:
            message: str = json.loads(body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = body.decode(errors="replace")[:200]
        return ClientError(f"{message} ({status})")


@dataclass(slots=True)
class Warmed:
    """How many pictures came from where, and what went wrong with which."""

    counts: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def pictures(directory: Path) -> list[Path]:
    """All pictures of a folder and the folders in it."""
    if not directory.is_dir():
        raise ClientError(f"{directory} is not a folder")
    return sorted(path for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ClientError(f"{path}: {exc.strerror}") from exc


def warm(url: str, api_key: str | None, paths: Sequence[Path]) -> Warmed:
    """Has every picture encoded that is not cached yet, four at a time, and shows how far it is."""
    warmed = Warmed()

    def one(path: Path) -> tuple[str, str | None]:
        try:
            return client.warm(read_file(path)), None
        except ClientError as exc:
            return "failed", f"{path}: {exc}"

    with MediaClient(url, api_key) as client, ThreadPoolExecutor(_NUM_UPLOADS) as pool:
        for source, error in track(pool.map(one, paths), "warming", total=len(paths)):
            _count(warmed, source, error)
    return warmed


def warm_by_ray_data(url: str, api_key: str | None, paths: Sequence[Path]) -> Warmed:
    """The same as a Ray Data job, whose tasks read and send from wherever the cluster has room."""
    try:
        import ray.data  # needs pyarrow and pandas, which nothing else here does

        from deploy import service
    except ImportError as exc:
        raise ClientError(
            f"--ray-data needs what ray.data does ({exc.name}): pip install 'ray[data]', or leave it out"
        ) from exc

    def send(row: dict[str, Any]) -> dict[str, Any]:
        try:
            with MediaClient(url, api_key) as client:
                return {"source": client.warm(row["bytes"]), "error": None}
        except ClientError as exc:
            return {"source": "failed", "error": f"{row['path']}: {exc}"}

    warmed, tasks = Warmed(), ray.data.TaskPoolStrategy(size=_NUM_UPLOADS)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    with service.ray_cluster(print):
        found = ray.data.read_binary_files([str(path) for path in paths], include_paths=True)
        for row in found.map(send, num_cpus=0.1, compute=tasks).iter_rows():
            _count(warmed, row["source"], row["error"])
    return warmed


def write_export(target: BinaryIO, chunks: Iterator[bytes]) -> int:
    """Writes an export from the service's stream of entries; returns how many there are."""
    digest = xxhash.xxh3_128()

    def write(data: bytes) -> None:
        target.write(data)
        digest.update(data)

    write(_MAGIC)
    count = 0
    for key, frame in _entries(_reader(chunks)):
        write(len(key).to_bytes(8, "little") + key + len(frame).to_bytes(8, "little"))
        write(frame)
        count += 1
    write(bytes(8) + count.to_bytes(8, "little"))
    target.write(digest.digest())
    return count


def check_export(file: Path) -> int:
    """How many embeddings are in an export. Raises ClientError unless it is whole and undamaged."""
    try:
        with file.open("rb") as source:
            size = file.stat().st_size
            digest = xxhash.xxh3_128()
            left = size - digest.digest_size
            while left > 0 and (chunk := source.read(min(left, 1024**2))):
                digest.update(chunk)
                left -= len(chunk)
            if left != 0 or source.read() != digest.digest():
                raise ClientError(f"{file} is no export of embeddings, or is damaged")
        return sum(1 for _ in read_export(file))
    except OSError as exc:
        raise ClientError(f"{file}: {exc.strerror}") from exc


def read_export(file: Path) -> Iterator[tuple[str, bytes]]:
    """Keys and frames. Raises ClientError for what is no export."""
    with file.open("rb") as source:
        if source.read(len(_MAGIC)) != _MAGIC:
            raise ClientError(f"{file} is no export of embeddings of version 1")
        count = 0
        for key, frame in _entries(source.read, stop_at_zero=True):
            yield key.decode(errors="replace"), frame
            count += 1
        if int.from_bytes(source.read(8), "little") != count:
            raise ClientError(f"{file} does not have as many embeddings as it says")


def _entries(read: Callable[[int], bytes], *, stop_at_zero: bool = False) -> Iterator[tuple[bytes, bytes]]:
    while prefix := read(8):
        if stop_at_zero and prefix == bytes(8):
            return
        key = _exactly(read, int.from_bytes(prefix, "little"), _MAX_KEY_BYTES)
        length = int.from_bytes(_exactly(read, 8, 8), "little")
        yield key, _exactly(read, length, _MAX_FRAME_BYTES)


def _exactly(read: Callable[[int], bytes], num_bytes: int, limit: int) -> bytes:
    data = read(num_bytes) if 0 < num_bytes <= limit else b""
    if not data or len(data) != num_bytes:
        raise ClientError("the export ends in the middle of an embedding, or is damaged")
    return data


def _reader(chunks: Iterator[bytes]) -> Callable[[int], bytes]:
    """`read(n)` on a stream of chunks."""
    buffer = bytearray()

    def read(num_bytes: int) -> bytes:
        while len(buffer) < num_bytes and (chunk := next(chunks, None)) is not None:
            buffer.extend(chunk)
        data = bytes(buffer[:num_bytes])
        del buffer[:num_bytes]
        return data

    return read


def _count(warmed: Warmed, source: str, error: str | None) -> None:
    warmed.counts[source] = warmed.counts.get(source, 0) + 1
    if error is not None:
        warmed.errors.append(error)
