"""Which graph a prompt is padded for."""

from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from llm_service.config import EngineConfig
from llm_service.engine.prompt_graphs import PromptGraphs, PromptShape, prompt_shapes

CONFIG = EngineConfig(prefill_chunk_size=512, max_num_batched_tokens=8192)


def shape(num_rows: int, num_slots: int = 0, num_sequences: int = 1) -> PromptShape:
    return PromptShape(num_rows, num_slots, num_sequences, num_rows, num_slots or num_rows)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> PromptGraphs:
    """Without what is captured."""
    monkeypatch.setattr(
        "llm_service.engine.prompt_graphs._capture", lambda decoder, shape, *_: SimpleNamespace(shape=shape)
    )
    return PromptGraphs(None, prompt_shapes(CONFIG, 8448, exact=False), 0, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "needed, found",
    [
        (shape(1), (64, 0)),
        (shape(300), (384, 0)),
        (shape(300, num_sequences=32), (384, 0)),
        (shape(1536), (1536, 0)),
        (shape(32, 2048), (64, 4096)),
        (shape(65, 4097), (256, 8448)),
        (shape(769, 8448), (1536, 8448)),
    ],
)
def test_smallest_graph_with_room_is_taken(graphs: PromptGraphs, needed: PromptShape, found: tuple[int, int]) -> None:
    graph = graphs.find(needed)
    assert graph is not None
    assert (graph.shape.num_rows, graph.shape.num_slots) == found


@pytest.mark.parametrize("needed", [shape(1537), shape(64, num_sequences=33), shape(1537, 2048), shape(8, 8449)])
def test_what_has_room_in_none_is_launched(graphs: PromptGraphs, needed: PromptShape) -> None:
    assert graphs.find(needed) is None


def test_exact_numerics_has_room_for_one_chunk() -> None:
    shapes = prompt_shapes(CONFIG, 8448, exact=True)
    assert {one.num_sequences for one in shapes} == {1}
    assert [one.num_rows for one in shapes if not one.num_slots] == [64, 128, 256, 384, 512]
    assert [(one.num_rows, one.num_slots) for one in shapes if one.num_slots] == [
        (rows, slots) for rows in (64, 256, 512) for slots in (4096, 8448)
    ]


def test_exact_chunks_that_are_longer_than_graphs_are_launched() -> None:
    assert prompt_shapes(EngineConfig(prefill_chunk_size=2048, max_num_batched_tokens=8192), 8448, exact=True) == []


def test_no_graph_is_longer_than_a_step_or_a_prompt() -> None:
    short = EngineConfig(prefill_chunk_size=64, max_num_batched_tokens=256)
    shapes = prompt_shapes(short, 1000, exact=False)
    assert max(one.num_rows for one in shapes) == 256
    assert {one.num_slots for one in shapes} == {0, 1000}


def test_a_very_long_past_is_launched() -> None:
    assert max(one.num_slots for one in prompt_shapes(CONFIG, 262_144, exact=True)) == 32768
