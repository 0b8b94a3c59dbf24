import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.embedding import WIRE_VERSION
from common.identity import EmbeddingNamespace, framed_digest, mm_hash, system_fingerprint

ROOT = Path(__file__).parents[2]
NAMESPACE = EmbeddingNamespace(
    weights="w",
    model_class="Qwen2VL",
    dtype="float32",
    numerics="exact",
    device="cpu/AVX512/1-thread",
    torch_version="2.13.0",
    attn_implementation="sdpa",
    preprocessing="pil",
    image_decoder="pillow 12",
)

lists_of_strings = st.lists(st.text())


@given(lists_of_strings, lists_of_strings)
def test_different_lists_have_different_digests(first: list[str], second: list[str]) -> None:
    assert (framed_digest(*first) == framed_digest(*second)) == (first == second)


@given(st.text(min_size=1), st.data())
def test_where_a_text_is_cut_changes_the_digest(text: str, data: st.DataObject) -> None:
    first, second = (data.draw(st.integers(0, len(text))) for _ in range(2))
    digests = [framed_digest(text[:cut], text[cut:]) for cut in (first, second)]
    assert (digests[0] == digests[1]) == (first == second)
    assert framed_digest(text) not in digests


def test_known_collisions_of_unframed_hashes_do_not_collide() -> None:
    lists = [["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["", "abc"], [], [""], ["", ""]]
    assert len({framed_digest(*strings) for strings in lists}) == len(lists)


def test_the_hash_of_an_image_is_whole_and_of_all_its_bytes() -> None:
    data = bytes(range(256)) * 1024
    assert len(mm_hash(data)) == 64
    hashes = {mm_hash(data), mm_hash(data + b"\0"), mm_hash(data[:-1]), mm_hash(data[:-1] + b"\0"), mm_hash(b"")}
    assert len(hashes) == 5


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EmbeddingNamespace)])
def test_every_field_of_the_namespace_changes_the_key(field: str) -> None:
    value: Any = WIRE_VERSION + 1 if field == "wire_version" else "other"
    other = dataclasses.replace(NAMESPACE, **{field: value})
    assert other.key("h", "p") != NAMESPACE.key("h", "p")


def test_fields_that_trade_values_change_the_key() -> None:
    first = dataclasses.replace(NAMESPACE, weights="a", model_class="b")
    second = dataclasses.replace(NAMESPACE, weights="b", model_class="a")
    assert str(first) != str(second)


def test_image_and_params_change_the_key() -> None:
    keys = {NAMESPACE.key(image, params) for image in ("a", "b") for params in ("max_pixels=1", "max_pixels=2")}
    assert len(keys) == 4


def test_the_fingerprint_of_the_system_changes_with_each_part() -> None:
    parts: dict[str, Any] = {
        "vision": NAMESPACE,
        "language_weights": "w",
        "mrope_rule": "qwen",
        "decoder": "cpu, prefill chunks of 64",
        "versions": "1",
    }
    others = [
        parts,
        parts | {"vision": dataclasses.replace(NAMESPACE, tenant="t")},
        parts | {"language_weights": "x"},
        parts | {"mrope_rule": "hf5"},
        parts | {"decoder": "cpu, prefill chunks of 128"},
        parts | {"versions": "2"},
    ]
    assert len({system_fingerprint(**other) for other in others}) == 6


def test_a_key_is_the_same_in_every_process() -> None:
    program = (
        "from common.identity import EmbeddingNamespace, mm_hash;"
        f"print(EmbeddingNamespace(*{dataclasses.astuple(NAMESPACE)!r}).key(mm_hash(b'image'), 'max_pixels=1'))"
    )
    command = [sys.executable, "-c", program]
    environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in ("0", "1", "4294967295")]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for environment in environments
    ]
    keys = {process.communicate()[0].strip() for process in processes}
    assert keys == {NAMESPACE.key(mm_hash(b"image"), "max_pixels=1")}
