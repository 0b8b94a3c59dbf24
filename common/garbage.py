"""Python's garbage collector in a replica."""

import gc


def leave_alone_what_is_there() -> None:
    """Called when a replica is ready: half a million objects of torch, transformers and Ray stay until it ends.

    To look through them takes 0.2 s on a CPU core, in which no token comes, and finds nothing.
    """
    gc.collect()
    gc.freeze()
