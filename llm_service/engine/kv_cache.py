"""KV memory in blocks: who owns which, which hold a prefix worth finding again, and which is given away next."""

from collections import OrderedDict

from common.identity import framed_digest
from llm_service.engine.request import MultiModalFeature, Request


class KVCacheManager:
    """The only one to touch block lists. It counts references; the memory itself belongs to the model runner.

    A block is *used* by one or more requests, *cached* (nobody's, but found by the hash of what it holds) or *free*.
    Free blocks are given away first, then cached ones, least recently used first. Prefixes are kept and found in
    multiples of `prefix_multiple` tokens, which may be whole blocks or parts of one.

    A block is written by its only owner and behind all that is findable in it. Whoever is about to write elsewhere gets
    a copy first, which `take_copies()` asks the model runner for: so requests can share a block that is partly filled.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_multiple: int, position_rule: str) -> None:
        assert prefix_multiple % block_size == 0 or block_size % prefix_multiple == 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_multiple = prefix_multiple
        self.hash_size = min(block_size, prefix_multiple)  # tokens behind one hash
        self.position_rule = position_rule
        self._ref_counts = [0] * num_blocks
        self._hashes: list[list[str]] = [[] for _ in range(num_blocks)]
        self._num_findable = [0] * num_blocks  # tokens at the start of a block that its hashes promise
        self._blocks_by_hash: dict[str, int] = {}
        self._free = list(reversed(range(num_blocks)))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._copies: list[tuple[int, int]] = []

    @property
    def num_available_blocks(self) -> int:
        return len(self._free) + len(self._cached)

    def share_prefix(self, request: Request, max_tokens: int) -> int:
        """Gives a request that owns no block the longest known prefix of at most `max_tokens`, as computed; returns its
        length. The last block may be shared in part.
        """
        assert not request.block_table
        hashes = self._prefix_hashes(request, 0, self._whole_prefix(max_tokens) // self.hash_size)
        blocks: list[int] = []
        num_tokens = 0
        while num_tokens == len(blocks) * self.block_size:
            found = self._find_in_block(hashes, len(blocks))
            if found is None:
                break
            block, num_tokens = found
            blocks.append(block)
        num_tokens = self._whole_prefix(num_tokens)
        self._share(request, blocks[: self._num_blocks(num_tokens)], num_tokens)
        return num_tokens

    def fork(self, parent: Request, child: Request, num_tokens: int) -> None:
        """Gives `child`, which owns no block, the first `num_tokens` of `parent`: computed, and the same in both."""
        assert not child.block_table and num_tokens <= parent.num_computed_tokens
        self._share(child, parent.block_table[: self._num_blocks(num_tokens)], num_tokens)
        child.block_hashes = parent.block_hashes[: num_tokens // self.hash_size]

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Prepares the block table for writing from `num_computed_tokens` on up to `num_tokens`. False, and nothing
        changed, when too few blocks are left.
        """
        num_missing = max(0, self._num_blocks(num_tokens) - len(request.block_table))
        place, offset = divmod(request.num_computed_tokens, self.block_size)
        needs_copy = place < len(request.block_table) and not self._may_write(request.block_table[place], offset)
        if not num_missing and not needs_copy:
            return True
        if num_missing + needs_copy <= self.num_available_blocks:
            if needs_copy:
                self._copy(request, place)
        elif num_missing <= self.num_available_blocks and self._ref_counts[request.block_table[place]] == 1:
            self._drop_hashes(request.block_table[place])  # no room for a copy, and nobody else to preempt for one
        else:
            return False
        request.block_table += [self._take() for _ in range(num_missing)]
        return True

    def take_copies(self) -> list[tuple[int, int]]:
        """Pairs of blocks, from and to, to copy before the next forward: all are read before any is written."""
        copies, self._copies = self._copies, []
        return copies

    def keep_prefix(self, request: Request, start: int, end: int) -> None:
        """Makes findable by hash what became whole when tokens `start` to `end` were computed."""
        first, last = self._whole_prefix(start) // self.hash_size, self._whole_prefix(end) // self.hash_size
        if first == last:
            return  # most often, so that it is asked first
        for index, prefix_hash in enumerate(self._prefix_hashes(request, first, last), first):
            # Two requests may have computed the same in the same step; the first one's is kept.
            if prefix_hash not in self._blocks_by_hash:
                place, offset = divmod(index * self.hash_size, self.block_size)
                block = request.block_table[place]
                self._blocks_by_hash[prefix_hash] = block
                self._hashes[block].append(prefix_hash)
                self._num_findable[block] = offset + self.hash_size

    def forget(self, request: Request) -> None:
        """Lets nobody find what a request holds, because it is not to be trusted; the request still owns it."""
        for block in request.block_table:
            self._drop_hashes(block)

    def free(self, request: Request) -> None:
        """Takes back all blocks of a request."""
        # From the end, so that the beginning, which more prompts share, is given away last.
        for block in reversed(request.block_table):
            self._give_back(block)
        request.block_table = []

    def check_no_leak(self) -> None:
        """With no request running every block is free or cached. A matter of two numbers, so that it can be asked
        whenever the engine is idle; `check_integrity()` looks at every block."""
        num_missing = self.num_blocks - self.num_available_blocks
        assert not num_missing, f"{num_missing} of {self.num_blocks} KV blocks are owned by nobody"
        assert not self._copies, "a copy of a KV block was asked for and not made"

    def check_integrity(self) -> None:
        """As `check_no_leak()`, and every hash leads to a cached block."""
        self.check_no_leak()
        leaked = set(range(self.num_blocks)).difference(self._free, self._cached)
        assert not leaked, f"{len(leaked)} of {self.num_blocks} KV blocks are owned by nobody: {sorted(leaked)[:8]}"
        assert not any(self._ref_counts), "a KV block that nobody uses is referenced"
        hashes = {prefix_hash: block for block, hashes in enumerate(self._hashes) for prefix_hash in hashes}
        assert hashes == self._blocks_by_hash, "hashes and KV blocks do not match"
        assert set(hashes.values()) == set(self._cached), "a free KV block has a hash"

    def _whole_prefix(self, num_tokens: int) -> int:
        return num_tokens // self.prefix_multiple * self.prefix_multiple

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _find_in_block(self, hashes: list[str], place: int) -> tuple[int, int] | None:
        """The block that holds most of a prompt's block number `place`, and the prompt's tokens up to there."""
        per_block = self.block_size // self.hash_size
        for index in reversed(range(place * per_block, min((place + 1) * per_block, len(hashes)))):
            block = self._blocks_by_hash.get(hashes[index])
            if block is not None:
                return block, (index + 1) * self.hash_size
        return None

    def _share(self, request: Request, blocks: list[int], num_tokens: int) -> None:
        for block in blocks:
            self._ref_counts[block] += 1
            self._cached.pop(block, None)
        request.block_table = blocks
        request.num_computed_tokens = num_tokens

    def _may_write(self, block: int, offset: int) -> bool:
        """The block is one request's alone, and nothing findable lies at or behind `offset`."""
        return self._ref_counts[block] == 1 and offset >= self._num_findable[block]

    def _copy(self, request: Request, place: int) -> None:
        source = request.block_table[place]
        request.block_table[place] = self._take()  # before the source is given back, so that they differ
        self._copies.append((source, request.block_table[place]))
        self._give_back(source)

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._drop_hashes(block)
        self._ref_counts[block] = 1
        return block

    def _give_back(self, block: int) -> None:
        self._ref_counts[block] -= 1
        if self._ref_counts[block]:
            return
        if self._hashes[block]:
            self._cached[block] = None
        else:
            self._free.append(block)

    def _drop_hashes(self, block: int) -> None:
        for prefix_hash in self._hashes[block]:
            del self._blocks_by_hash[prefix_hash]
        self._hashes[block] = []
        self._num_findable[block] = 0

    def _prefix_hashes(self, request: Request, first: int, last: int) -> list[str]:
        """Hashes `first` to `last`, each of `hash_size` tokens and all before. A request's tokens only grow, so what is
        known stays valid.
        """
        hashes = request.block_hashes
        while len(hashes) < last:
            parent = hashes[-1] if hashes else framed_digest("kv", self.position_rule, request.cache_salt)
            hashes.append(block_hash(parent, request, len(hashes) * self.hash_size, self.hash_size))
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
