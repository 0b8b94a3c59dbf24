"""Images behind http(s) URLs, for a service that must not be made to call addresses of its own network.

The host must be one of those that are allowed; its name is resolved once, every address it has must be public, and the
connection goes to such an address and no other. Redirects are checked like the first URL.
"""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urljoin

import httpx2

from common.errors import InvalidRequestError, PayloadTooLargeError, UnfetchableMediaError
from llm_service.config import FetchConfig

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]
Note = Callable[[int], None]

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Nothing may be compressed, so that no few bytes become many.
_HEADERS = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "fovea"}


async def resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for _, _, _, _, address in found]


class ImageFetcher:
    """`resolve_name` and `transport` are for tests."""

    def __init__(
        self,
        config: FetchConfig,
        max_image_bytes: int,
        resolve_name: Resolve = resolve,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._config = config
        self._max_image_bytes = max_image_bytes
        self._resolve = resolve_name
        self._transport = transport

    async def fetch(self, url: str, field: str, note: Note = lambda num_bytes: None) -> bytes:
        """`note` is told how many bytes have come, whenever some do; what it raises ends the fetching.

        Raises InvalidRequestError for a URL that is not allowed, UnfetchableMediaError where it gives nothing.
        """
        if not self._config.allowed_hosts:
            raise InvalidRequestError(
                "images are sent as data URLs (data:image/png;base64,...); fetching other URLs is off "
                "(api.fetch.allowed_hosts)",
                param=field,
                code="invalid_image_url",
            )
        try:
            async with asyncio.timeout(self._config.timeout_s):
                return await self._follow(url, field, note)
        except (TimeoutError, httpx2.TimeoutException) as exc:
            raise UnfetchableMediaError(
                f"the image did not arrive within {self._config.timeout_s:g} s (api.fetch.timeout_s)",
                param=field,
                code="image_unavailable",
            ) from exc
        except (httpx2.HTTPError, OSError, UnicodeError) as exc:
            raise UnfetchableMediaError("the image cannot be fetched", param=field, code="image_unavailable") from exc

    async def _follow(self, url: str, field: str, note: Note) -> bytes:
        for _ in range(self._config.max_redirects + 1):
            async with self._get(url, field) as response:
                if response.status_code in _REDIRECTS and "location" in response.headers:
                    url = urljoin(url, response.headers["location"])
                    continue
                return await self._read(response, field, note)
        raise UnfetchableMediaError(
            f"more than {self._config.max_redirects} redirects (api.fetch.max_redirects)",
            param=field,
            code="image_unavailable",
        )

    @contextlib.asynccontextmanager
    async def _get(self, text: str, field: str) -> AsyncIterator[httpx2.Response]:
        """The answer of the one address that was checked, under the name of the host."""
        url = self._checked_url(text, field)
        address = await self._public_address(url, field)
        pinned = url.copy_with(host=address)
        headers = {**_HEADERS, "host": url.netloc.decode()}
        # trust_env: a proxy of the environment would resolve the name again
        async with (
            httpx2.AsyncClient(transport=self._transport, trust_env=False, timeout=self._config.timeout_s) as client,
            client.stream("GET", pinned, headers=headers, extensions={"sni_hostname": url.host}) as response,
        ):
            yield response

    def _checked_url(self, text: str, field: str) -> httpx2.URL:
        # One parser decides what is connected to; what another would read differently is refused.
        if "\\" in text or any(character <= " " or character == "\x7f" for character in text):
            raise _not_allowed("it has characters that no URL has", field)
        try:
            url = httpx2.URL(text)
        except (httpx2.InvalidURL, ValueError, UnicodeError) as exc:
            raise _not_allowed("it is not a URL", field) from exc
        schemes = ("https", "http") if self._config.allow_http else ("https",)
        if url.scheme not in schemes:
            raise _not_allowed(f"its scheme must be {' or '.join(schemes)} (api.fetch.allow_http)", field)
        if url.userinfo:
            raise _not_allowed("it has a user name", field)
        if url.port not in (None, _PORTS[url.scheme]):
            raise _not_allowed("it names a port", field)
        if not self._is_allowed(url.host):
            raise _not_allowed("its host is not one of api.fetch.allowed_hosts", field)
        return url

    def _is_allowed(self, host: str) -> bool:
        name = host.lower().rstrip(".")
        return bool(name) and any(
            allowed == "*" or name == allowed.lower() or (allowed[:2] == "*." and name.endswith(allowed[1:].lower()))
            for allowed in self._config.allowed_hosts
        )

    async def _public_address(self, url: httpx2.URL, field: str) -> str:
        found = await self._resolve(url.host, url.port or _PORTS[url.scheme])
        addresses = [ipaddress.ip_address(text.partition("%")[0]) for text in found]
        if not addresses or not all(map(is_public, addresses)):
            raise _not_allowed("its host has an address that is not public", field)
        return str(addresses[0])

    async def _read(self, response: httpx2.Response, field: str, note: Note) -> bytes:
        if response.status_code != 200:
            raise UnfetchableMediaError(
                f"the image's host answered with status {response.status_code}", param=field, code="image_unavailable"
            )
        if response.headers.get("content-encoding", "identity") != "identity":
            raise UnfetchableMediaError("the image is sent compressed", param=field, code="image_unavailable")
        data = bytearray()
        async for chunk in response.aiter_bytes():
            note(len(chunk))
            data += chunk
            if len(data) > self._max_image_bytes:
                raise PayloadTooLargeError(
                    f"the image has more than {self._max_image_bytes} bytes (limits.max_image_bytes)",
                    param=field,
                    code="image_too_large",
                )
        return bytes(data)


def is_public(address: Address) -> bool:
    """Whether it is an address of the internet, and so is one that it may stand for."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.teredo is not None or address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _not_allowed(reason: str, field: str) -> InvalidRequestError:
    return InvalidRequestError(f"the URL is not fetched: {reason}", param=field, code="invalid_image_url")
