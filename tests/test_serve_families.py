"""Families other than Qwen over real Ray Serve, each deployed over the last: answers are the one-piece model's."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from deploy import service
from deploy.client import Client
from tests.conftest import picture
from tests.tiny_families import Reference, write_tiny_family

pytestmark = [
    pytest.mark.serve,
    # Ray's own sockets and files are closed when its processes end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

MAX_TOKENS = 12
PORT = service.free_port()  # Serve keeps its proxy's port from one application to the next


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    with service.ray_cluster(print) as found:
        yield found
        service.remove(service.connect(found))


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "internvl", "idefics3", "instructblip"])
def test_answers_over_serve_are_those_of_the_one_piece_model(name: str, dashboard: str, tmp_path: Path) -> None:
    checkpoint = write_tiny_family(name, tmp_path / name)
    reference = Reference(name, checkpoint)
    images = [picture(90, 140, seed) for seed in range(reference.family.max_images)]
    expected = []
    for question in ("What is this?", "Where?"):
        tokens = reference.tokens(question, [Image.open(io.BytesIO(image)) for image in images], MAX_TOKENS)
        # An answer cut inside a character ends in U+FFFD; the service leaves such a character out.
        text = reference.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        expected.append((text.rstrip("\ufffd"), len(tokens)))
    manager = service.connect(dashboard)
    config = service.application_config(model=str(checkpoint), port=PORT)
    manager.deploy_applications(config)
    service.wait_until_ready(manager, service.url_of(config), print)
    client = Client(service.url_of(config))
    assert client.model() == str(checkpoint)
    answers = [
        client.ask(images, question, max_tokens=MAX_TOKENS, temperature=0) for question in ("What is this?", "Where?")
    ]
    assert [(answer.text, answer.num_tokens) for answer in answers] == expected
    assert [image["source"] for image in answers[0].images] == ["encoder"] * len(images)
    again = "encoder" if reference.family.model_type == "instructblip" else "local"  # its features know the question
    assert [image["source"] for image in answers[1].images] == [again] * len(images)
