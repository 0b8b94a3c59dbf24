"""Blocks are owned, shared, kept and given away as the manager promises."""

import random

import pytest
import torch

from common.embedding import Grid, VisionEmbedding
from llm_service.engine.kv_cache import KVCacheManager
from llm_service.engine.request import MultiModalFeature, PlaceholderRange, Request, SamplingParams

IMAGE = 300


def manager(
    num_blocks: int = 8, block_size: int = 4, *, prefix_multiple: int = 4, position_rule: str = "qwen"
) -> KVCacheManager:
    return KVCacheManager(num_blocks, block_size, prefix_multiple=prefix_multiple, position_rule=position_rule)


def request_of(token_ids: list[int], *images: MultiModalFeature, cache_salt: str = "") -> Request:
    positions = torch.arange(len(token_ids)).expand(3, -1)
    return Request("r", token_ids, positions, len(token_ids), SamplingParams(), list(images), cache_salt)


def image(
    key: str, offset: int, length: int = 6, grid_thw: Grid = (1, 4, 6), interval: float = 1.0
) -> MultiModalFeature:
    embedding = VisionEmbedding({"features": torch.zeros(length, 2)}, grid_thw)
    return MultiModalFeature(key, PlaceholderRange(offset, length), embedding, interval)


def computed(blocks: KVCacheManager, request: Request) -> Request:
    """Allocates, computes and keeps all of a request, which then runs."""
    assert blocks.allocate(request, request.num_tokens)
    blocks.keep_prefix(request, 0, request.num_tokens)
    return request


def hashes(*requests: Request, position_rule: str = "qwen") -> list[list[str]]:
    for request in requests:
        computed(manager(position_rule=position_rule), request)
    return [request.block_hashes for request in requests]


def test_a_prefix_is_shared_and_counted() -> None:
    blocks = manager()
    first = computed(blocks, request_of(list(range(10))))
    second = request_of([*range(8), 77, 78])
    assert blocks.share_prefix(second, 9) == 8
    assert second.block_table == first.block_table[:2]
    assert blocks.allocate(second, 10)
    blocks.free(first)
    assert blocks.num_available_blocks == 5  # three in use by the second
    blocks.free(second)
    blocks.check_integrity()


def test_a_prefix_is_found_after_its_owner_has_gone() -> None:
    blocks = manager()
    blocks.free(computed(blocks, request_of(list(range(12)))))
    again = request_of(list(range(12)))
    assert blocks.share_prefix(again, 11) == 8  # at most 11 tokens: the last is computed again
    blocks.free(again)
    blocks.check_integrity()


def test_prefixes_count_in_whole_multiples() -> None:
    blocks = manager(num_blocks=16, prefix_multiple=8)
    computed(blocks, request_of(list(range(30))))
    assert blocks.share_prefix(request_of([*range(28), 99]), 28) == 24
    assert blocks.share_prefix(request_of([*range(15), 99]), 16) == 8
    assert blocks.share_prefix(request_of([*range(7), 99]), 8) == 0


def test_too_few_blocks_change_nothing() -> None:
    blocks = manager(num_blocks=3)
    computed(blocks, request_of(list(range(8))))
    other = request_of(list(range(50, 60)))
    assert not blocks.allocate(other, 5)
    assert other.block_table == []
    assert blocks.allocate(other, 4)
    assert len(other.block_table) == 1


def test_the_least_recently_used_prefix_is_given_away_and_its_end_first() -> None:
    blocks = manager(num_blocks=4)
    old, new = request_of([1] * 8), request_of([2] * 8)
    for request in (old, new):
        blocks.free(computed(blocks, request))
    blocks.allocate(request_of([3]), 1)
    assert blocks.share_prefix(request_of([1] * 9), 8) == 4  # its second block is gone
    assert blocks.share_prefix(request_of([2] * 9), 8) == 8


def test_free_blocks_are_given_away_before_cached_ones() -> None:
    blocks = manager(num_blocks=4)
    blocks.free(computed(blocks, request_of([1] * 8)))
    for _ in range(5):
        other = request_of([2])
        assert blocks.allocate(other, 1)
        blocks.free(other)
    assert blocks.share_prefix(request_of([1] * 9), 8) == 8


def test_the_same_block_computed_twice_is_kept_once() -> None:
    blocks = manager()
    first, second = (computed(blocks, request_of([1] * 8)) for _ in range(2))
    assert set(first.block_table).isdisjoint(second.block_table)
    blocks.free(second)
    blocks.free(first)
    blocks.check_integrity()
    assert blocks.share_prefix(request_of([1] * 9), 8) == 8


def test_what_is_computed_in_pieces_is_kept_in_whole_blocks() -> None:
    blocks = manager()
    request = request_of(list(range(12)))
    blocks.allocate(request, 12)
    kept = []
    for start in range(12):
        blocks.keep_prefix(request, start, start + 1)
        probe = request_of([*range(12), 99])
        kept.append(blocks.share_prefix(probe, 12))
        blocks.free(probe)
    assert kept == [0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12]


def test_random_use_never_loses_a_block() -> None:
    rng = random.Random(0)
    blocks = manager(num_blocks=12)
    running: list[Request] = []
    for _ in range(3000):
        if running and rng.random() < 0.5:
            blocks.free(running.pop(rng.randrange(len(running))))
        else:
            request = request_of([rng.randrange(2) for _ in range(rng.randint(1, 20))])
            shared = blocks.share_prefix(request, request.num_tokens - 1)
            if blocks.allocate(request, request.num_tokens):
                blocks.keep_prefix(request, shared, rng.randint(shared, request.num_tokens))
                running.append(request)
            else:
                blocks.free(request)
        used = {block for request in running for block in request.block_table}
        assert len(used) + blocks.num_available_blocks == 12
    for request in running:
        blocks.free(request)
    blocks.check_integrity()


def test_a_part_of_a_block_is_reused_by_copy() -> None:
    blocks = manager(num_blocks=4, block_size=16, prefix_multiple=4)
    first = computed(blocks, request_of(list(range(30))))
    second = request_of([*range(27), 99, 98])
    assert blocks.share_prefix(second, 28) == 24
    assert second.block_table == first.block_table  # for now
    assert blocks.allocate(second, 29)
    assert second.block_table[0] == first.block_table[0]
    assert blocks.take_copies() == [(first.block_table[1], second.block_table[1])]
    assert blocks.take_copies() == []


def test_whoever_writes_last_into_a_forked_block_keeps_it() -> None:
    blocks = manager(num_blocks=8)
    parent = request_of(list(range(6)))
    blocks.allocate(parent, 6)
    parent.num_computed_tokens = 6
    children = [request_of(list(range(6))) for _ in range(2)]
    for child in children:
        blocks.fork(parent, child, 6)
    shared = parent.block_table[1]
    for request in (parent, *children):
        assert blocks.allocate(request, 7)
    assert [source for source, _ in blocks.take_copies()] == [shared, shared]
    assert children[1].block_table[1] == shared
    assert len({request.block_table[1] for request in (parent, *children)}) == 3


def test_without_room_for_a_copy_the_last_owner_takes_the_block_over() -> None:
    blocks = manager(num_blocks=2, block_size=16, prefix_multiple=4)
    blocks.free(computed(blocks, request_of(list(range(30)))))
    again = request_of([*range(20), *[99] * 12])
    assert blocks.share_prefix(again, 31) == 20
    assert blocks.allocate(again, 32)
    assert blocks.take_copies() == []
    blocks.free(again)
    blocks.check_integrity()
    assert blocks.share_prefix(request_of(list(range(30))), 29) == 16


class Memory:
    """What blocks hold, a row being the tokens up to it: as keys and values, it depends on all before."""

    def __init__(self, blocks: KVCacheManager) -> None:
        self.blocks = blocks
        self.rows: list[list[tuple[int, ...]]] = [[()] * blocks.block_size for _ in range(blocks.num_blocks)]

    def compute(self, request: Request, end: int) -> None:
        copies = self.blocks.take_copies()
        contents = [list(self.rows[source]) for source, _ in copies]
        for (_, target), rows in zip(copies, contents, strict=True):
            self.rows[target] = rows
        start = request.num_computed_tokens
        for index in range(start, end):
            place, offset = divmod(index, self.blocks.block_size)
            self.rows[request.block_table[place]][offset] = tuple(request.token_ids(0, index + 1))
        request.num_computed_tokens = end
        self.blocks.keep_prefix(request, start, end)

    def check(self, request: Request) -> None:
        for index in range(request.num_computed_tokens):
            place, offset = divmod(index, self.blocks.block_size)
            assert self.rows[request.block_table[place]][offset] == tuple(request.token_ids(0, index + 1))


@pytest.mark.parametrize(("block_size", "prefix_multiple"), [(16, 4), (8, 8), (4, 8), (12, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_random_forks_and_prefixes_never_change_what_a_request_has_computed(
    block_size: int, prefix_multiple: int, seed: int
) -> None:
    rng = random.Random(seed)
    blocks = manager(num_blocks=24, block_size=block_size, prefix_multiple=prefix_multiple)
    memory = Memory(blocks)
    running: list[Request] = []
    num_shared = num_forked = 0
    for _ in range(600):
        match rng.randrange(4):
            case 0 if running:  # one leaves
                blocks.free(running.pop(rng.randrange(len(running))))
            case 1:  # one arrives
                request = request_of(rng.choices([0, 1], [20, 1], k=rng.randint(1, 40)))
                num_shared += blocks.share_prefix(request, request.num_tokens - 1)
                if blocks.allocate(request, request.num_tokens):
                    memory.compute(request, rng.randint(request.num_computed_tokens + 1, request.num_tokens))
                    running.append(request)
                else:
                    blocks.free(request)
            case 2 if running:  # one is forked
                parent = rng.choice(running)
                num_tokens = rng.randint(1, parent.num_computed_tokens)
                child = request_of([*parent.token_ids(0, num_tokens), rng.randrange(2)])
                blocks.fork(parent, child, num_tokens)
                running.append(child)
                num_forked += 1
            case _ if running:  # one says a token
                request = rng.choice(running)
                if request.num_computed_tokens == request.num_tokens:
                    request.output_token_ids.append(rng.randrange(2))
                if blocks.allocate(request, request.num_computed_tokens + 1):
                    memory.compute(request, request.num_computed_tokens + 1)
        for request in running:
            memory.check(request)
        used = {block for request in running for block in request.block_table}
        assert len(used) + blocks.num_available_blocks == 24
    for request in running:
        blocks.free(request)
    blocks.check_integrity()
    assert num_shared > 100
    assert num_forked > 50


def test_integrity_notices_a_block_that_was_not_given_back() -> None:
    blocks = manager()
    computed(blocks, request_of([1] * 8))
    with pytest.raises(AssertionError, match="2 of 8 KV blocks are owned by nobody"):
        blocks.check_integrity()


def test_hashes_are_chained_and_stable() -> None:
    """Literals, because other processes must find the same."""
    (hashed,) = hashes(request_of([1, 2, 3, IMAGE, *[IMAGE] * 5, 4, 5, 6], image("key", 3)))
    assert [block_hash[:16] for block_hash in hashed] == [
        "5ec23828b9c0f6f9",
        "951b887b46b2f731",
        "5d42525398756f43",
    ]


def differing(*requests: Request) -> list[list[bool]]:
    """Per request and block: does the hash differ from the first request's?"""
    first, *others = hashes(*requests)
    return [[a != b for a, b in zip(first, other, strict=True)] for other in others]


def test_a_block_is_named_by_everything_its_content_depends_on() -> None:
    token_ids = [*range(5), *[IMAGE] * 6, 8, *range(4)]  # four blocks; the image touches the second and the third
    unchanged = request_of(token_ids, image("key", 5))
    cases = {
        "token": request_of([*token_ids[:4], 99, *token_ids[5:]], image("key", 5)),
        "key": request_of(token_ids, image("other", 5)),
        "start": request_of(token_ids, image("key", 4)),
        "grid": request_of(token_ids, image("key", 5, grid_thw=(1, 6, 4))),
        "interval": request_of(token_ids, image("key", 5, interval=2.0)),
    }
    for name, case in cases.items():
        assert differing(unchanged, case) == [[False, True, True, True]], name
    salted = request_of(token_ids, image("key", 5), cache_salt="tenant")
    assert differing(unchanged, salted) == [[True] * 4]
    other_rule = hashes(request_of(token_ids, image("key", 5)), position_rule="hf5")[0]
    assert set(other_rule).isdisjoint(hashes(request_of(token_ids, image("key", 5)))[0])


def test_fields_cannot_be_moved_into_one_another() -> None:
    token_ids = [IMAGE] * 8
    one = request_of(token_ids, image("a", 0, 4), image("b", 4, 4))
    other = request_of(token_ids, image("ab", 0, 4), image("", 4, 4))
    assert differing(one, other) == [[True, True]]


def test_the_same_image_at_another_start_shares_nothing_from_there_on() -> None:
    first = request_of([1, 2, 3, 4, *[IMAGE] * 6, 5, 6], image("key", 4))
    second = request_of([1, 2, 3, 4, 9, *[IMAGE] * 6, 6], image("key", 5))
    assert differing(first, second) == [[False, True, True]]
