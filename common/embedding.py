"""The encoder's answer and its wire format: a strict msgpack header, then raw tensor buffers.

Layout of a packed embedding, little endian:

    magic "FVEA" | version u16 | seal u16 | header length u32 | frame length u64 | digest of all other bytes, 16 bytes
    msgpack header | padding to 64 | buffer 0 | padding to 64 | buffer 1 | ...

The seal says how the digest is made: xxh3_128 notices damage; BLAKE3 keyed with a secret also refuses what was written
by someone who does not have it.

The same bytes are the encoder's reply and the value in Redis. Nothing is unpickled, and a reader checks every field
before it trusts a byte.
"""

import hmac
import math
import struct
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import blake3
import msgpack
import torch
import xxhash
from torch import Tensor

Grid = tuple[int, int, int]  # (t, h, w) in patches
Buffer = bytes | memoryview

WIRE_VERSION = 2

_MAGIC = b"FVEA"
_PREFIX = struct.Struct("<4sHHIQ")
_DIGEST_BYTES = 16
_HEADER_FROM = _PREFIX.size + _DIGEST_BYTES
_ALIGNMENT = 64
_MAX_HEADER_BYTES = 64 * 1024
KEPT = "kept"
_DEEPSTACK = "deepstack_"
_INDEX_DTYPE = torch.int32
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int32": _INDEX_DTYPE}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FIELDS = {"key", "grid_thw", "tensors", "producer", "created", "encode_ms"}


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
class Seal:
    """How the digest of a frame is made: the number that says so in the frame, and 16 bytes from all other bytes."""

    number: int
    digest: Callable[[Iterable[Buffer]], bytes] = field(repr=False)  # it holds the secret


@dataclass(frozen=True, slots=True)
class VisionEmbedding:
    """What the encoder says about one image or one temporal grid.

    `tensors["features"]` is `[N, hidden]`; with deepstack there are `deepstack_0 [N, hidden]`, ... too. `grid_thw` is
    the patch grid behind the N rows. If these are a part of the image's rows, `kept [N, 1]`, int32, has their indices
    among all of them, ascending. Tensors that came from `unpack()` share the packed buffer: do not write to them.
    """

    tensors: Mapping[str, Tensor]
    grid_thw: Grid
    encode_ms: float = 0.0  # what it cost to make, waiting not counted; 0 if nobody measured

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def features(self) -> Tensor:
        return self.tensors["features"]

    @property
    def deepstack(self) -> list[Tensor]:
        """What is added to the rows behind the first decoder layers, one tensor for each of them."""
        number = sum(name.startswith(_DEEPSTACK) for name in self.tensors)
        return [self.tensors[name] for name in deepstack_names(number)]

    @property
    def kept(self) -> Tensor | None:
        """Which rows these are, ascending, `[N]` in int64; None if no others were dropped."""
        return self.tensors[KEPT].flatten().long() if KEPT in self.tensors else None

    def rows(self, kept: Tensor) -> "VisionEmbedding":
        """Those rows alone of a whole embedding, the same bits; `kept` is ascending."""
        tensors = {name: tensor[kept.to(tensor.device)] for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors | {KEPT: kept.to(_INDEX_DTYPE)[:, None]})

    @property
    def num_tokens(self) -> int:
        return self.features.shape[0]


@dataclass(frozen=True, slots=True)
class EmbeddingSpec:
    """What the embedding of an image of a known size must look like; an entry that differs is a miss.

    If these are a part of the image's rows, `num_rows` is how many it has.
    """

    grid_thw: Grid
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    num_rows: int | None = None

    def dtype_of(self, name: str) -> torch.dtype:
        return _INDEX_DTYPE if name == KEPT else self.dtype

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(shape) * self.dtype_of(name).itemsize for name, shape in self.shapes.items())

    @property
    def num_tokens(self) -> int:
        return self.shapes["features"][0]


def deepstack_names(number: int) -> list[str]:
    return [f"{_DEEPSTACK}{index}" for index in range(number)]


def _xxh3_digest(parts: Iterable[Buffer]) -> bytes:
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


CHECKSUM = Seal(0, _xxh3_digest)


def keyed_seal(secret: str) -> Seal:
    """BLAKE3 under a key made from `secret`, which both services must share."""
    key = blake3.blake3(secret.encode(), derive_key_context="fovea: seals of packed embeddings").digest()

    def digest(parts: Iterable[Buffer]) -> bytes:
        hasher = blake3.blake3(key=key)
        for part in parts:
            hasher.update(part)
        return hasher.digest(_DIGEST_BYTES)

    return Seal(1, digest)


def pack(embedding: VisionEmbedding, *, key: str, producer: str = "", seal: Seal = CHECKSUM) -> bytes:
    """One contiguous frame. `key` is the full cache key; `producer` names the replica, for people who debug."""
    return b"".join(pack_parts(embedding, key=key, producer=producer, seal=seal))


def pack_parts(
    embedding: VisionEmbedding, *, key: str, producer: str = "", seal: Seal = CHECKSUM
) -> list[bytes | memoryview]:
    """The frame in pieces, of which those of the tensors share their memory: nothing large is copied."""
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
            "encode_ms": embedding.encode_ms,
        }
    )
    parts: list[bytes | memoryview] = [header]
    position = _HEADER_FROM + len(header)
    for tensor in embedding.tensors.values():
        buffer = _bytes_of(tensor)
        padding = -position % _ALIGNMENT
        parts += [bytes(padding), buffer]
        position += padding + len(buffer)
    prefix = _PREFIX.pack(_MAGIC, WIRE_VERSION, seal.number, len(header), position)
    return [prefix, seal.digest([prefix, *parts]), *parts]


def unpack(
    data: bytes | bytearray | memoryview, *, key: str, spec: EmbeddingSpec | None = None, seal: Seal = CHECKSUM
) -> VisionEmbedding:
    """The inverse of `pack()`, without copying tensors. Raises EmbeddingFormatError unless everything fits.

    `key` must be the one that was packed, so that an entry stored under a wrong key is noticed; `spec` is what the
    image's size implies.
    """
    view = memoryview(data)
    if len(view) < _HEADER_FROM:
        raise EmbeddingFormatError(f"{len(view)} bytes are less than a frame's prefix of {_HEADER_FROM}")
    magic, version, seal_number, header_bytes, frame_bytes = _PREFIX.unpack_from(view)
    if (magic, version) != (_MAGIC, WIRE_VERSION):
        raise EmbeddingFormatError(f"not a frame of wire version {WIRE_VERSION}")
    if seal_number != seal.number:
        raise EmbeddingFormatError(f"the frame has seal {seal_number}, this service uses {seal.number}")
    if frame_bytes != len(view):
        raise EmbeddingFormatError(f"the frame says {frame_bytes} bytes, {len(view)} arrived")
    if header_bytes > min(_MAX_HEADER_BYTES, len(view) - _HEADER_FROM):
        raise EmbeddingFormatError(f"a header of {header_bytes} bytes does not fit")
    digest = seal.digest([view[: _PREFIX.size], view[_HEADER_FROM:]])
    if not hmac.compare_digest(digest, view[_PREFIX.size : _HEADER_FROM]):
        raise EmbeddingFormatError("the digest does not match")
    header = _read_header(view[_HEADER_FROM : _HEADER_FROM + header_bytes])
    if header["key"] != key:
        raise EmbeddingFormatError("the entry belongs to another key")
    embedding = _read_tensors(view, _HEADER_FROM + header_bytes, header)
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
    if any(tensor.dtype != spec.dtype_of(name) for name, tensor in embedding.tensors.items()):
        raise EmbeddingSpecError(f"the tensors are not all {spec.dtype}")
    if spec.num_rows is not None and not _are_ascending(embedding.tensors[KEPT], spec.num_rows):
        raise EmbeddingSpecError(f"the rows that are kept are not ascending ones of {spec.num_rows}")


def _are_ascending(indices: Tensor, end: int) -> bool:
    """All different, too, and from 0 up to `end`."""
    bounded = torch.cat([indices.new_tensor([[-1]]), indices, indices.new_tensor([[end]])]).long()
    return bool((bounded.diff(dim=0) > 0).all())


def pinned(data: Buffer, embedding: VisionEmbedding) -> tuple[Buffer, VisionEmbedding]:
    """A copy of a frame and of what was unpacked from it, in page-locked memory that both share.

    From there a GPU copies while the CPU goes on. The tensors are views of a block of torch's allocator, which does not
    use it anew before such copies have ended.
    """
    source = torch.frombuffer(data, dtype=torch.uint8)
    block = torch.empty(len(data), dtype=torch.uint8, pin_memory=True)
    block.copy_(source)

    def moved(tensor: Tensor) -> Tensor:
        start = tensor.data_ptr() - source.data_ptr()
        assert 0 <= start <= len(data) - tensor.nbytes, "the embedding does not share the memory of its frame"
        return block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    tensors = {name: moved(tensor) for name, tensor in embedding.tensors.items()}
    return block.numpy().data, replace(embedding, tensors=tensors)


def pinned_bytes(num_bytes: int) -> int:
    """What torch's allocator takes for a block of `num_bytes`: the next power of two."""
    return 1 << max(0, num_bytes - 1).bit_length()


def content_digest(embedding: VisionEmbedding) -> str:
    """BLAKE3 of names, dtypes, shapes and every bit of the tensors: equal only for equal embeddings."""
    digest = blake3.blake3()
    for name, tensor in sorted(embedding.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


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
    if not (type(header["encode_ms"]) is float and 0 <= header["encode_ms"] < math.inf):
        raise EmbeddingFormatError("encode_ms must be a number of milliseconds")
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
    return VisionEmbedding(tensors=tensors, grid_thw=tuple(header["grid_thw"]), encode_ms=header["encode_ms"])
