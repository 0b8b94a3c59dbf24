"""Images behind URLs: off by default, and never a call to an address that is not public."""

import asyncio
import ipaddress
from collections.abc import Callable

import httpx2
import pytest

from common.errors import InvalidRequestError, PayloadTooLargeError, UnfetchableMediaError
from llm_service.config import FetchConfig
from llm_service.fetch import ImageFetcher, is_public

PUBLIC = "93.184.215.14"


class Web:
    """A resolver and a transport that note what is asked of them."""

    def __init__(self, addresses: dict[str, list[str]], answer: Callable[[httpx2.Request], httpx2.Response]) -> None:
        self.addresses = addresses
        self.resolved: list[str] = []
        self.requests: list[httpx2.Request] = []
        self._answer = answer

    async def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        if host not in self.addresses:
            raise OSError("no such host")
        return self.addresses[host]

    def fetcher(self, max_image_bytes: int = 1000, **config: object) -> ImageFetcher:
        def handle(request: httpx2.Request) -> httpx2.Response:
            self.requests.append(request)
            return self._answer(request)

        transport = httpx2.MockTransport(handle)
        return ImageFetcher(
            FetchConfig(**({"allowed_hosts": ("*",)} | config)), max_image_bytes, self.resolve, transport
        )


def image(request: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(200, content=b"bytes")


async def test_fetching_is_off_by_default() -> None:
    web = Web({"example.org": [PUBLIC]}, image)
    with pytest.raises(InvalidRequestError, match=r"api\.fetch\.allowed_hosts") as refused:
        await web.fetcher(allowed_hosts=()).fetch("https://example.org/a.png", "here")
    assert refused.value.param == "here"
    assert web.resolved == web.requests == []


async def test_the_connection_goes_to_the_address_that_was_checked_under_the_name_of_the_host() -> None:
    web = Web({"example.org": [PUBLIC]}, image)
    assert await web.fetcher().fetch("https://example.org/a.png?b=1", "here") == b"bytes"
    [request] = web.requests
    assert request.url.host == PUBLIC
    assert request.headers["host"] == "example.org"
    assert request.extensions["sni_hostname"] == "example.org"
    assert web.resolved == ["example.org"]


@pytest.mark.parametrize(
    ("allowed", "host", "is_allowed"),
    [
        (("example.org",), "example.org", True),
        (("example.org",), "EXAMPLE.org", True),
        (("example.org",), "sub.example.org", False),
        (("*.example.org",), "sub.example.org", True),
        (("*.example.org",), "example.org", False),
        (("*.example.org",), "badexample.org", False),
        (("example.org",), "example.org.evil.com", False),
    ],
)
async def test_only_hosts_that_are_allowed_are_called(allowed: tuple[str, ...], host: str, is_allowed: bool) -> None:
    web = Web({host.lower(): [PUBLIC], host: [PUBLIC]}, image)
    fetch = web.fetcher(allowed_hosts=allowed).fetch(f"https://{host}/a.png", "here")
    if is_allowed:
        assert await fetch == b"bytes"
    else:
        with pytest.raises(InvalidRequestError, match="allowed_hosts"):
            await fetch
        assert web.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.png", "file:///etc/passwd", "gopher://example.org/", "https://user@example.org/a.png",
        "https://user:pw@example.org/", "https://example.org:8443/a.png", "https://example.org\\@127.0.0.1/",
        "https://example.org/a b.png", "https://example.org/\n", "https:///a.png", "https://[::1/", "https://",
    ],
)  # fmt: skip
async def test_odd_urls_are_refused_before_anything_is_resolved(url: str) -> None:
    web = Web({"example.org": [PUBLIC]}, image)
    with pytest.raises(InvalidRequestError) as refused:
        await web.fetcher().fetch(url, "here")
    assert refused.value.status == 400
    assert web.resolved == web.requests == []


PRIVATE = [
    "127.0.0.1", "127.1.2.3", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "224.0.0.1", "240.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1", "::1", "::", "fe80::1", "fc00::1",
    "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::", "2002:c0a8:101::", "2001:0:7f00:1::", "2001:db8::1", "fe80::1%eth0",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
async def test_host_with_one_address_that_is_not_public_is_not_called(address: str) -> None:
    web = Web({"example.org": [PUBLIC, address]}, image)
    with pytest.raises(InvalidRequestError, match="not public"):
        await web.fetcher().fetch("https://example.org/a.png", "here")
    assert web.requests == []


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.1", "[::1]", "localhost"])
async def test_addresses_in_any_notation_come_out_of_the_resolver_and_are_checked(host: str) -> None:
    web = Web({host.strip("[]"): ["127.0.0.1"]}, image)
    with pytest.raises((InvalidRequestError, UnfetchableMediaError)):
        await web.fetcher().fetch(f"https://{host}/a.png", "here")
    assert web.requests == []


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


async def test_each_redirect_is_checked_like_the_first_url() -> None:
    def redirect(request: httpx2.Request) -> httpx2.Response:
        if request.headers["host"] == "example.org":
            return httpx2.Response(302, headers={"location": "https://inside.example.org/a.png"})
        return httpx2.Response(200, content=b"secret")

    web = Web({"example.org": [PUBLIC], "inside.example.org": ["10.0.0.1"]}, redirect)
    with pytest.raises(InvalidRequestError, match="not public"):
        await web.fetcher().fetch("https://example.org/a.png", "here")
    assert [request.url.host for request in web.requests] == [PUBLIC]


async def test_a_name_that_means_another_address_the_second_time_is_checked_again() -> None:
    web = Web({"example.org": [PUBLIC]}, lambda request: httpx2.Response(302, headers={"location": "/b.png"}))
    seen = web.resolve

    async def rebinding(host: str, port: int) -> list[str]:
        found = await seen(host, port)
        web.addresses["example.org"] = ["127.0.0.1"]
        return found

    web.resolve = rebinding  # type: ignore[method-assign]
    with pytest.raises(InvalidRequestError, match="not public"):
        await web.fetcher().fetch("https://example.org/a.png", "here")
    assert [request.url.host for request in web.requests] == [PUBLIC]


async def test_endless_redirects_end() -> None:
    web = Web({"example.org": [PUBLIC]}, lambda request: httpx2.Response(302, headers={"location": "/again"}))
    with pytest.raises(UnfetchableMediaError, match="more than 3 redirects"):
        await web.fetcher().fetch("https://example.org/a.png", "here")
    assert len(web.requests) == 4


async def test_too_many_bytes_are_not_read() -> None:
    web = Web({"example.org": [PUBLIC]}, lambda request: httpx2.Response(200, content=b"x" * 2000))
    with pytest.raises(PayloadTooLargeError, match="1000 bytes"):
        await web.fetcher().fetch("https://example.org/a.png", "here")


async def test_what_is_compressed_is_refused() -> None:
    def compressed(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-encoding": "gzip"}, stream=httpx2.ByteStream(b"x"))

    with pytest.raises(UnfetchableMediaError, match="compressed"):
        await Web({"example.org": [PUBLIC]}, compressed).fetcher().fetch("https://example.org/a.png", "here")


async def test_host_that_is_slow_or_says_no_is_a_422() -> None:
    web = Web({"example.org": [PUBLIC]}, lambda request: httpx2.Response(404))
    with pytest.raises(UnfetchableMediaError, match="status 404") as refused:
        await web.fetcher().fetch("https://example.org/a.png", "here")
    assert refused.value.status == 422

    async def never(host: str, port: int) -> list[str]:
        await asyncio.sleep(10)
        return []

    web.resolve = never  # type: ignore[method-assign]
    with pytest.raises(UnfetchableMediaError, match=r"within 0\.05 s"):
        await web.fetcher(timeout_s=0.05).fetch("https://example.org/a.png", "here")
