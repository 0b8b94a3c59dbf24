"""Damaged images of every odd kind get a 200 or a 400, from the HTTP surface and from the encoder service itself."""

import itertools
import random
import struct
from collections import Counter
from collections.abc import Callable

import httpx2
import pytest

from common.errors import InvalidRequestError
from common.media import MediaItem
from deploy.bench.image_bombs import PNG_SIGNATURE, png_chunk
from tests.encoder_service.test_preprocess import PARAMS
from tests.odd_images import ODD, REFUSED, SIXTEEN_BIT_GRAYSCALE
from tests.services import URL, Services, body, image_part

# As outside of tests: what decoders only warn of is no error.
pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLE, SOAK = 360, 12_000

Mutation = Callable[[bytearray, random.Random], bytes]


def truncated(data: bytearray, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def bits_flipped(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 2, 4, 16, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def header_edited(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(min(len(data), 64))] = rng.choice((0, 1, 2, 8, 16, 0x7F, 0x80, 0xFE, 0xFF))
    return data


def bytes_inserted_or_deleted(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 2, 4))):
        at = rng.randrange(len(data))
        data[at : at + rng.randint(0, 8)] = rng.randbytes(rng.randint(0, 8))
    return data


def slices_swapped(data: bytearray, rng: random.Random) -> bytes:
    length = rng.randint(1, max(1, len(data) // 4))
    first, second = sorted(rng.randrange(len(data) - length + 1) for _ in range(2))
    if second - first >= length:
        one = data[first : first + length]
        data[first : first + length] = data[second : second + length]
        data[second : second + length] = one
    return data


def slice_repeated(data: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    piece = data[start : start + rng.randint(1, 64)]
    return data[:start] + piece * rng.choice((2, 3, 100)) + data[start:]


def blocks_shuffled(data: bytearray, rng: random.Random) -> bytes:
    """Of a PNG its chunks, of a JPEG its segments; what comes last of these stays so."""
    blocks = list(png_blocks(data)) if data.startswith(PNG_SIGNATURE) else list(jpeg_blocks(data))
    moved = rng.sample(range(len(blocks)), min(2, len(blocks)))
    for one, other in itertools.pairwise(moved):
        blocks[one], blocks[other] = blocks[other], blocks[one]
    return b"".join(blocks)


MUTATIONS: list[Mutation] = [
    truncated, bits_flipped, header_edited, bytes_inserted_or_deleted, slices_swapped, slice_repeated, blocks_shuffled,
]  # fmt: skip


def png_blocks(data: bytes) -> list[bytes]:
    blocks, at = [bytes(data[:8])], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        blocks.append(bytes(data[at : at + 12 + length]))
        at += 12 + length
    return blocks


def jpeg_blocks(data: bytes) -> list[bytes]:
    blocks, at = [bytes(data[:2])], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        blocks.append(bytes(data[at:end]))
        at = end
    return [*blocks, bytes(data[at:])]


def with_right_checksums(png: bytes) -> bytes:
    """Or a decoder would look at nothing of a changed chunk."""
    signature, *chunks = png_blocks(png)
    return signature + b"".join(png_chunk(chunk[4:8], chunk[8:-4]) for chunk in chunks)


def mutated(index: int) -> bytes:
    rng = random.Random(index)
    makers = list((ODD | SIXTEEN_BIT_GRAYSCALE | REFUSED).values())
    data = makers[index % len(makers)](rng.randrange(10))
    for mutate in rng.choices(MUTATIONS, k=rng.choice((1, 1, 2))):
        data = mutate(bytearray(data), rng) or b"\0"
    return with_right_checksums(data) if data.startswith(PNG_SIGNATURE) and rng.random() < 0.7 else bytes(data)


async def encoder_status(services: Services, data: bytes) -> int:
    try:
        await services.encoder.encode(MediaItem.of(data, PARAMS))
    except InvalidRequestError as exc:
        return exc.status
    return 200


async def hammer(services: Services, http: httpx2.AsyncClient, indices: range) -> None:
    statuses: Counter[tuple[int, int]] = Counter()
    for index in indices:
        data = mutated(index)
        answer = await http.post(URL, json=body(image_part(data), "What?", max_tokens=1))
        statuses[answer.status_code, await encoder_status(services, data)] += 1
        assert answer.status_code in (200, 400), (index, answer.text)
    print(statuses)
    assert statuses[200, 200] > len(indices) // 20 and statuses[400, 400] > len(indices) // 20
    answer = await http.post(URL, json=body(image_part(ODD["PNG"](0)), "What?", max_tokens=1))
    assert answer.status_code == 200
    assert (await http.get("/health")).json()["running"] == 0


async def test_what_is_mutated_is_answered_before(services: Services, http: httpx2.AsyncClient) -> None:
    for make in (ODD | SIXTEEN_BIT_GRAYSCALE).values():
        answer = await http.post(URL, json=body(image_part(make(1)), "What?", max_tokens=1))
        assert answer.status_code == 200


async def test_no_mutated_image_is_answered_with_a_5xx(services: Services, http: httpx2.AsyncClient) -> None:
    await hammer(services, http, range(SAMPLE))


@pytest.mark.soak
async def test_no_mutated_image_is_answered_with_a_5xx_12000_times(
    services: Services, http: httpx2.AsyncClient
) -> None:
    await hammer(services, http, range(SOAK))
