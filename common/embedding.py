"""The encoder's answer and its wire format: a strict msgpack header, then raw tensor buffers.

Layout of a packed embedding, little endian:

    magic "FVEA" | version u16 | reserved u16 | header length u32 | frame length u64 | xxh3_128 of all that follows
    msgpack header | padding to 64 | buffer 0 | padding to 64 | buffer 1 | ...

The same bytes are the encoder's reply and the value in Redis. Nothing is unpickled, and a reader checks every field
before it trusts a byte.
"""

import struct
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import torch
import xxhash
from torch import Tensor

Grid = tuple[int, int, int]  # (t, h, w) in patches

WIRE_VERSION = 1

_MAGIC = b"FVEA"
_PREFIX = struct.Struct("<4sHHIQ16s")
_HASHED_FROM = _PREFIX.size
_ALIGNMENT = 64
_MAX_HEADER_BYTES = 64 * 1024
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FIELDS = {"key", "grid_thw", "tensors", "producer", "created"}


# torch warns, once a process, that a read-only buffer could be written to; VisionEmbedding's docstring forbids it.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"0", dtype=torch.uint8)


class EmbeddingFormatError(ValueError):
    """The bytes are not the embedding they should be: damaged, of another version, or of another image."""

    reason = "format"


class EmbeddingSpecError(EmbeddingFormatError):
    """A sound embedding, but not what the size of its image implies."""

    reason = "spec"


@dataclass(frozen=True, slots=True)
class VisionEmbedding:
    """What the encoder says about one image or one temporal grid.

    `tensors["features"]` is `[N, hidden]`; some families add more (`deepstack_0 [N, hidden]`, ...). `grid_thw` is the
    patch grid behind the N rows. Tensors that came from `unpack()` share the packed buffer: do not write to them.
    """

    tensors: Mapping[str, Tensor]
    grid_thw: Grid

    @property
    def features(self) -> Tensor:
        return self.tensors["features"]

    @property
    def num_tokens(self) -> int:
        return self.features.shape[0]


@dataclass(frozen=True, slots=True)
class EmbeddingSpec:
    """What the embedding of an image of a known size must look like; an entry that differs is a miss."""

    grid_thw: Grid
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    @property
    def num_tokens(self) -> int:
        return self.shapes["features"][0]


def pack(embedding: VisionEmbedding, *, key: str, producer: str = "") -> bytes:
    """One contiguous frame. `key` is the full cache key; `producer` names the replica, for people who debug."""
    buffers = [_bytes_of(tensor) for tensor in embedding.tensors.values()]
    descriptions = [
        [name, _DTYPE_NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in embedding.tensors.items()
    ]
    header: bytes = msgpack.packb(
        {
            "key": key,
            "grid_thw": list(embedding.grid_thw),
            "tensors": descriptions,
            "producer": producer,
            "created": time.time(),
        }
    )
    parts: list[bytes | memoryview] = [header]
    position = _PREFIX.size + len(header)
    for buffer in buffers:
        padding = -position % _ALIGNMENT
        parts += [bytes(padding), buffer]
        position += padding + len(buffer)
    checksum = xxhash.xxh3_128()
    for part in parts:
        checksum.update(part)
    prefix = _PREFIX.pack(_MAGIC, WIRE_VERSION, 0, len(header), position, checksum.digest())
    return b"".join([prefix, *parts])


def unpack(data: bytes | bytearray | memoryview, *, key: str, spec: EmbeddingSpec | None = None) -> VisionEmbedding:
    """The inverse of `pack()`, without copying tensors. Raises EmbeddingFormatError unless everything fits.

    `key` must be the one that was packed, so that an entry stored under a wrong key is noticed; `spec` is what the
    image's size implies.
    """
    view = memoryview(data)
    if len(view) < _PREFIX.size:
        raise EmbeddingFormatError(f"{len(view)} bytes are less than a frame's prefix of {_PREFIX.size}")
    magic, version, reserved, header_bytes, frame_bytes, digest = _PREFIX.unpack_from(view)
    if (magic, version, reserved) != (_MAGIC, WIRE_VERSION, 0):
        raise EmbeddingFormatError(f"not a frame of wire version {WIRE_VERSION}")
    if frame_bytes != len(view):
        raise EmbeddingFormatError(f"the frame says {frame_bytes} bytes, {len(view)} arrived")
    if header_bytes > min(_MAX_HEADER_BYTES, len(view) - _PREFIX.size):
        raise EmbeddingFormatError(f"a header of {header_bytes} bytes does not fit")
    if xxhash.xxh3_128_digest(view[_HASHED_FROM:]) != digest:
        raise EmbeddingFormatError("the checksum does not match")
    header = _read_header(view[_PREFIX.size : _PREFIX.size + header_bytes])
    if header["key"] != key:
        raise EmbeddingFormatError("the entry belongs to another key")
    embedding = _read_tensors(view, _PREFIX.size + header_bytes, header)
    if spec is not None:
        check(embedding, spec)
    return embedding


def check(embedding: VisionEmbedding, spec: EmbeddingSpec) -> None:
    """Raises EmbeddingSpecError unless the embedding is what the size of its image implies."""
    if embedding.grid_thw != spec.grid_thw:
        raise EmbeddingSpecError(f"the grid is {embedding.grid_thw}, the image implies {spec.grid_thw}")
    shapes = {name: tuple(tensor.shape) for name, tensor in embedding.tensors.items()}
    if shapes != dict(spec.shapes):
        raise EmbeddingSpecError(f"the tensors are {shapes}, the image implies {dict(spec.shapes)}")
    if any(tensor.dtype != spec.dtype for tensor in embedding.tensors.values()):
        raise EmbeddingSpecError(f"the tensors are not all {spec.dtype}")


def _bytes_of(tensor: Tensor) -> memoryview:
    # numpy has no bfloat16, so every dtype travels as bytes.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read_header(data: memoryview) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(data, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as exc:
        raise EmbeddingFormatError("the header is not msgpack") from exc
    if not isinstance(header, dict) or header.keys() != _FIELDS:
        raise EmbeddingFormatError(f"the header must have exactly the fields {sorted(_FIELDS)}")
    grid, tensors = header["grid_thw"], header["tensors"]
    if not (_are_sizes(grid) and len(grid) == 3):
        raise EmbeddingFormatError("grid_thw must be three positive integers")
    if not (isinstance(tensors, list) and all(_is_description(entry) for entry in tensors)):
        raise EmbeddingFormatError("tensors must be a list of [name, dtype, shape]")
    if len({name for name, _, _ in tensors}) != len(tensors) or "features" not in [name for name, _, _ in tensors]:
        raise EmbeddingFormatError("tensor names must be unique and include 'features'")
    return header


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 < size < 2**40 for size in value)


def _is_description(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 3
        and isinstance(entry[0], str)
        and isinstance(entry[1], str)
        and entry[1] in _DTYPES
        and _are_sizes(entry[2])
        and len(entry[2]) == 2
    )


def _read_tensors(view: memoryview, position: int, header: dict[str, Any]) -> VisionEmbedding:
    tensors = {}
    for name, dtype_name, (rows, columns) in header["tensors"]:
        dtype = _DTYPES[dtype_name]
        start = position + -position % _ALIGNMENT
        position = start + rows * columns * dtype.itemsize
        if position > len(view):
            raise EmbeddingFormatError(f"tensor {name!r} runs past the end of the frame")
        tensors[name] = torch.frombuffer(view[start:position], dtype=torch.uint8).view(dtype).view(rows, columns)
    if position != len(view):
        raise EmbeddingFormatError(f"{len(view) - position} bytes follow the last tensor")
    return VisionEmbedding(tensors=tensors, grid_thw=tuple(header["grid_thw"]))


