import random
import resource
import struct
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from common.config import CacheConfig
from common.embedding import (
    CHECKSUM,
    WIRE_VERSION,
    EmbeddingFormatError,
    EmbeddingSpec,
    Seal,
    VisionEmbedding,
    keyed_seal,
    pack,
    pack_parts,
    unpack,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADER: Mapping[str, Any] = {
    "key": "k",
    "grid_thw": [1, 4, 6],
    "tensors": [["features", "float32", [6, 8]]],
    "producer": "",
    "created": 0.0,
    "encode_ms": 0.0,
}
HEADER_SPEC = EmbeddingSpec(grid_thw=(1, 4, 6), shapes={"features": (6, 8)}, dtype=torch.float32)


def frame(header: bytes, payload: bytes = bytes(6 * 8 * 4), *, version: int = WIRE_VERSION) -> bytes:
    """A frame whose prefix and checksum are right, whatever its header says."""
    body = header + bytes(-(36 + len(header)) % 64) + payload
    prefix = struct.pack("<4sHHIQ", b"FVEA", version, 0, len(header), 36 + len(body))
    return prefix + xxhash.xxh3_128_digest(prefix + body) + body


def is_refused(data: bytes, *, key: str = "k", spec: EmbeddingSpec | None = None, seal: Seal = CHECKSUM) -> bool:
    """Whether unpack() raises EmbeddingFormatError; any other exception is the test's failure."""
    try:
        unpack(data, key=key, spec=spec, seal=seal)
    except EmbeddingFormatError:
        return True
    return False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", [["features"], ["features", "deepstack_0", "deepstack_1"]], ids=len)
def test_unpacking_gives_back_what_was_packed(dtype: torch.dtype, names: list[str]) -> None:
    tensors = {name: torch.randn(12, 7).to(dtype) for name in names}
    tensors["features"][0] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-8, 6e4, 1.0])

    unpacked = unpack(pack(VisionEmbedding(tensors, (3, 4, 4)), key="k"), key="k")

    assert unpacked.grid_thw == (3, 4, 4)
    assert list(unpacked.tensors) == names
    for name, tensor in tensors.items():
        assert unpacked.tensors[name].dtype == dtype
        assert torch.equal(unpacked.tensors[name].view(torch.uint8), tensor.view(torch.uint8))  # NaN too, bit for bit


def test_a_view_that_is_not_contiguous_is_packed_as_it_reads() -> None:
    features = torch.arange(96.0).view(8, 12).t()[::2]
    unpacked = unpack(pack(VisionEmbedding({"features": features}, (1, 4, 6)), key="k"), key="k")
    assert torch.equal(unpacked.features, features)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_unpacked(kind: Callable[[bytes], Any], embedding: VisionEmbedding) -> None:
    assert torch.equal(unpack(kind(pack(embedding, key="k")), key="k").features, embedding.features)


def test_the_frame_of_the_tests_is_the_frame_of_the_code() -> None:
    assert torch.equal(unpack(frame(msgpack.packb(HEADER)), key="k").features, torch.zeros(6, 8))


def test_every_truncation_is_refused(embedding: VisionEmbedding) -> None:
    data = pack(embedding, key="k")
    assert all(is_refused(data[:length]) for length in range(len(data)))


def test_every_changed_byte_is_refused(embedding: VisionEmbedding) -> None:
    data = pack(embedding, key="k")
    rng = random.Random(0)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= rng.randrange(1, 256)
        assert is_refused(bytes(damaged)), f"byte {position}"


def test_inserted_moved_and_appended_bytes_are_refused(embedding: VisionEmbedding) -> None:
    data = pack(embedding, key="k")
    rng = random.Random(0)
    for _ in range(500):
        start, end = sorted(rng.sample(range(len(data)), 2))
        assert is_refused(data[:start] + rng.randbytes(rng.randrange(1, 9)) + data[start:])
        assert is_refused(data[:start] + data[end:])
        assert is_refused(data + rng.randbytes(rng.randrange(1, 9)))


def test_an_entry_of_another_key_is_refused(embedding: VisionEmbedding) -> None:
    keys = ["k", "K", "k ", "", "k" * 200]
    frames = {key: pack(embedding, key=key) for key in keys}
    for key in keys:
        assert [is_refused(frames[other], key=key) for other in keys] == [other != key for other in keys]


def test_packing_and_unpacking_copy_no_payload() -> None:
    features = torch.zeros(1024, 1024)
    frame = pack(VisionEmbedding({"features": features}, (1, 64, 64)), key="k")
    tracemalloc.start()
    parts = pack_parts(VisionEmbedding({"features": features}, (1, 64, 64)), key="k")
    unpacked = unpack(frame, key="k")
    _, allocated = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert allocated < features.nbytes // 8  # msgpack's own buffer is 256 KiB
    assert np.frombuffer(parts[-1], np.uint8).ctypes.data == features.data_ptr()
    start = np.frombuffer(frame, np.uint8).ctypes.data
    assert start < unpacked.features.data_ptr() < start + len(frame)


def test_a_sealed_frame_opens_with_its_secret_only(embedding: VisionEmbedding) -> None:
    ours, theirs = keyed_seal("a secret of ours"), keyed_seal("a secret of theirs")
    data = pack(embedding, key="k", seal=ours)
    assert torch.equal(unpack(data, key="k", seal=ours).features, embedding.features)
    assert is_refused(data, seal=theirs)
    assert is_refused(data)


def test_a_frame_without_a_seal_is_refused_where_there_is_a_secret(embedding: VisionEmbedding) -> None:
    data = bytearray(pack(embedding, key="k"))
    assert is_refused(bytes(data), seal=keyed_seal("a secret"))
    data[6] = keyed_seal("a secret").number
    assert is_refused(bytes(data), seal=keyed_seal("a secret"))


def test_every_changed_byte_of_a_sealed_frame_is_refused(embedding: VisionEmbedding) -> None:
    seal = keyed_seal("a secret")
    data = pack(embedding, key="k", seal=seal)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1
        assert is_refused(bytes(damaged), seal=seal), f"byte {position}"


def test_a_secret_is_not_shown() -> None:
    config = CacheConfig(secret=SecretStr("a secret of a service"))
    assert "a secret" not in repr(config) + str(config.model_dump()) + config.model_dump_json()
    assert "a secret" not in repr(keyed_seal("a secret"))


def test_a_frame_of_another_version_is_refused() -> None:
    assert is_refused(frame(msgpack.packb(HEADER), version=WIRE_VERSION + 1))


@pytest.mark.parametrize(
    "other",
    [
        EmbeddingSpec((1, 6, 4), {"features": (6, 8)}, torch.float32),
        EmbeddingSpec((1, 4, 6), {"features": (8, 6)}, torch.float32),
        EmbeddingSpec((1, 4, 6), {"features": (5, 8)}, torch.float32),
        EmbeddingSpec((1, 4, 6), {"features": (6, 8)}, torch.float16),
        EmbeddingSpec((1, 4, 6), {"other": (6, 8)}, torch.float32),
        EmbeddingSpec((1, 4, 6), {"features": (6, 8), "deepstack_0": (6, 8)}, torch.float32),
    ],
    ids=["grid", "shape", "rows", "dtype", "name", "number"],
)
def test_an_embedding_that_the_image_does_not_imply_is_refused(
    embedding: VisionEmbedding, spec: EmbeddingSpec, other: EmbeddingSpec
) -> None:
    data = pack(embedding, key="k")
    assert not is_refused(data, spec=spec)
    assert is_refused(data, spec=other)


@pytest.mark.parametrize(
    "change",
    [
        {"key": 7},
        {"key": b"k"},
        {"grid_thw": [1, 4]},
        {"grid_thw": [1, 4, 0]},
        {"grid_thw": [1, 4, True]},
        {"grid_thw": [1, 4, 2**63]},
        {"grid_thw": "146"},
        {"tensors": []},
        {"tensors": {}},
        {"tensors": [["other", "float32", [6, 8]]]},
        {"tensors": [["features", "float32", [6, 8]]] * 2},
        {"tensors": [["features", "float64", [6, 8]]]},
        {"tensors": [["features", ["float32"], [6, 8]]]},
        {"tensors": [["features", {}, [6, 8]]]},
        {"tensors": [["features", "float32", [6, -8]]]},
        {"tensors": [["features", "float32", [6, 8.0]]]},
        {"tensors": [["features", "float32", [48]]]},
        {"tensors": [["features", "float32", [6, 4]]]},
        {"tensors": [["features", "float32", [7, 8]]]},
        {"tensors": [[["features"], "float32", [6, 8]]]},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_header_that_says_something_else_is_refused(change: dict[str, Any]) -> None:
    assert is_refused(frame(msgpack.packb({**HEADER, **change})))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        b"\x80\x04N.",
        msgpack.packb([HEADER]),
        msgpack.packb({1: 2}),
        msgpack.packb(msgpack.ExtType(5, b"x")),
        msgpack.packb(HEADER) + b"\0",
        b"\x91" * 60_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xd6\xff\0\0\0\0",
        b"\xa1\xff",
    ],
    ids=range(13),
)
def test_a_header_that_is_not_a_header_is_refused(header: bytes) -> None:
    assert is_refused(frame(header))


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["key", "grid_thw", "tensors"]), anything)
def test_whatever_a_header_holds_is_refused(field: str, value: object) -> None:
    if value != HEADER[field]:
        assert is_refused(frame(msgpack.packb({**HEADER, field: value})), spec=HEADER_SPEC)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_headers_are_refused(header: bytes) -> None:
    assert is_refused(frame(header))


@pytest.mark.parametrize("rows", [2**20, 2**39, 2**40, 2**63, 2**64 - 1])
def test_a_declared_size_is_never_allocated(rows: int) -> None:
    header = {**HEADER, "tensors": [["features", "float32", [rows, 2**39]]]}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert is_refused(frame(msgpack.packb(header)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024  # KiB


def test_a_declared_header_length_is_never_trusted(embedding: VisionEmbedding) -> None:
    data = bytearray(pack(embedding, key="k"))
    for header_bytes in (0, 1, len(data), 2**31, 2**32 - 1):
        struct.pack_into("<I", data, 8, header_bytes)
        assert is_refused(bytes(data))
