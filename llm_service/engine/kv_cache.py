"""KV memory in blocks: who owns which, which hold a prefix worth finding again, and which is given away next."""

from collections import OrderedDict

from common.identity import framed_digest
from llm_service.engine.request import MultiModalFeature, Request


class KVCacheManager:
    """The only one to touch block lists. It counts references; the memory itself belongs to the model runner.

    A block is *used* by one or more requests, *cached* (nobody's, but found by the hash of what it holds) or *free*.
    Free blocks are given away first, then cached ones, least recently used first. Prefixes are kept and found in
    multiples of `prefix_multiple` tokens.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_multiple: int, position_rule: str) -> None:
        assert prefix_multiple % block_size == 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_multiple = prefix_multiple
        self.position_rule = position_rule
        self._ref_counts = [0] * num_blocks
        self._hashes: list[str | None] = [None] * num_blocks
        self._blocks_by_hash: dict[str, int] = {}
        self._free = list(reversed(range(num_blocks)))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available_blocks(self) -> int:
        return len(self._free) + len(self._cached)

    def share_prefix(self, request: Request, max_tokens: int) -> int:
        """Gives a request that owns no block the longest known prefix of at most `max_tokens`; returns its length."""
        assert not request.block_table
        shared: list[int] = []
        for block_hash in self._block_hashes(request, 0, max_tokens // self.block_size):
            block = self._blocks_by_hash.get(block_hash)
            if block is None:
                break
            shared.append(block)
        num_tokens = self._whole_prefix(len(shared) * self.block_size)
        request.block_table = shared[: num_tokens // self.block_size]
        for block in request.block_table:
            self._ref_counts[block] += 1
            self._cached.pop(block, None)
        return num_tokens

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Extends the block table to hold `num_tokens`. False, and nothing changed, when too few blocks are left."""
        num_missing = -(-num_tokens // self.block_size) - len(request.block_table)
        if num_missing > self.num_available_blocks:
            return False
        request.block_table += [self._take() for _ in range(num_missing)]
        return True

    def keep_prefix(self, request: Request, start: int, end: int) -> None:
        """Makes the blocks that became whole when tokens `start` to `end` were computed findable by their hash."""
        first, last = (self._whole_prefix(num_tokens) // self.block_size for num_tokens in (start, end))
        for index, block_hash in enumerate(self._block_hashes(request, first, last), first):
            # Two requests may have computed the same block in the same step; the first one's is kept.
            if block_hash not in self._blocks_by_hash:
                block = request.block_table[index]
                self._blocks_by_hash[block_hash] = block
                self._hashes[block] = block_hash

    def forget(self, request: Request) -> None:
        """Lets nobody find what a request holds, because it is not to be trusted; the request still owns it."""
        for block in request.block_table:
            self._drop_hash(block)

    def free(self, request: Request) -> None:
        """Takes back all blocks of a request."""
        # From the end, so that the beginning, which more prompts share, is given away last.
        for block in reversed(request.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            if self._hashes[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None
        request.block_table = []

    def check_integrity(self) -> None:
        """With no request running every block is free or cached, and every hash leads to a cached block."""
        leaked = set(range(self.num_blocks)).difference(self._free, self._cached)
        assert not leaked, f"{len(leaked)} of {self.num_blocks} KV blocks are owned by nobody: {sorted(leaked)[:8]}"
        assert self.num_available_blocks == self.num_blocks, "a KV block is both free and cached"
        assert not any(self._ref_counts), "a KV block that nobody uses is referenced"
        hashes = {block_hash: block for block, block_hash in enumerate(self._hashes) if block_hash is not None}
        assert hashes == self._blocks_by_hash, "hashes and KV blocks do not match"
        assert set(hashes.values()) == set(self._cached), "a free KV block has a hash"

    def _whole_prefix(self, num_tokens: int) -> int:
        return num_tokens // self.prefix_multiple * self.prefix_multiple

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._drop_hash(block)
        self._ref_counts[block] = 1
        return block

    def _drop_hash(self, block: int) -> None:
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._blocks_by_hash[block_hash]
            self._hashes[block] = None

    def _block_hashes(self, request: Request, first: int, last: int) -> list[str]:
        """Hashes of blocks `first` to `last`. A request's tokens only grow, so what is known stays valid."""
        hashes = request.block_hashes
        while len(hashes) < last:
            parent = hashes[-1] if hashes else framed_digest("kv", self.position_rule, request.cache_salt)
            hashes.append(block_hash(parent, request, len(hashes) * self.block_size, self.block_size))
        return hashes[first:last]


def block_hash(parent: str, request: Request, start: int, block_size: int) -> str:
    """What the keys and values of a block depend on: all before it, its tokens, and the images it touches.

    Placeholders of all images are the same token, so an image counts by its key, and by its grid and interval, which
    decide its positions. Its start is relative to the block: what lies before is in `parent`.
    """
    end = start + block_size
    token_ids = request.token_ids(start, end)
    assert len(token_ids) == block_size
    images = (field for feature in request.mm_features for field in _image_fields(feature, start, end))
    return framed_digest(parent, ",".join(map(str, token_ids)), *images)


def _image_fields(feature: MultiModalFeature, start: int, end: int) -> tuple[str, ...]:
    offset, length = feature.position.offset, feature.position.length
    if offset >= end or offset + length <= start:
        return ()
    return (feature.key, str(offset - start), str(tuple(feature.embedding.grid_thw)), repr(float(feature.interval)))
