"""What a replica does about Python's garbage collector."""

import gc
import weakref

from common.garbage import no_collection


class Ring:
    def __init__(self) -> None:
        self.itself = self


def test_nothing_is_collected_during_a_capture_and_all_is_afterwards() -> None:
    with no_collection():
        ring = weakref.ref(Ring())
        for _ in range(10_000):
            Ring()
        assert ring() is not None
        with no_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.collect()
    assert ring() is None
