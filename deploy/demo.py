"""`fovea demo`: draws pictures, starts the service on the embedded model, and asks it about the files."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy import service
from deploy.client import Answer, Client
from deploy.shapes.scenes import Scene, render, scene_of

Report = Callable[[str], None]

PICTURES: dict[str, Scene] = {
    "two-shapes.png": scene_of(("red circle", 0.25, 0.5, 0.18), ("blue square", 0.72, 0.45, 0.16)),
    "triangles.jpg": scene_of(
        ("green triangle", 0.15, 0.3, 0.16),
        ("green triangle", 0.45, 0.7, 0.16),
        ("green triangle", 0.8, 0.3, 0.16),
        ("purple diamond", 0.78, 0.76, 0.14),
        width=480,
        height=320,
        background=(235, 225, 200),
        noise=8,
    ),
    "tall.png": scene_of(
        ("yellow cross", 0.5, 0.2, 0.14),
        ("black circle", 0.5, 0.75, 0.24),
        width=200,
        height=420,
        background=(90, 140, 170),
    ),
}


@dataclass(frozen=True, slots=True)
class Question:
    pictures: tuple[str, ...]
    text: str
    expected: str


QUESTIONS = (
    Question(("two-shapes.png",), "What colour is the circle?", "red"),
    Question(("two-shapes.png",), "Is the red circle left or right of the blue square?", "left"),
    Question(("two-shapes.png",), "图中有几个图形？", "两个"),
    Question(("triangles.jpg",), "How many triangles are there?", "three"),
    Question(("triangles.jpg",), "菱形是什么颜色？", "紫色"),
    Question(("tall.png",), "Is the yellow cross above or below the black circle?", "above"),
    Question(("tall.png",), "Which is bigger, the yellow cross or the black circle?", "black circle"),
    Question(("two-shapes.png", "triangles.jpg"), "Which image has more triangles?", "the second"),
)


def run(*, port: int | None, stop: bool, report: Report) -> bool:
    """Whether all answers were right. Keeps serving until Ctrl-C if they were, unless told to `stop`."""
    directory = draw()
    report(f"drew {len(PICTURES)} pictures in {directory}")
    with service.running_service(service.application_config(port=port), report) as running:
        url = running.url
        report(f"ready at {url}/v1")
        client = Client(url)
        wrong = [question for question in QUESTIONS if not ask(client, directory, question)]
        if wrong:
            report(f"{len(wrong)} of {len(QUESTIONS)} answers are wrong")
            return False
        report(f"all {len(QUESTIONS)} answers are right")
        if not stop:
            report(f"serving at {url}/v1 - end with Ctrl-C; try: fovea ask {directory / 'tall.png'} 'What do you see?'")
            service.wait_until_stopped(url)
    return True


def draw() -> Path:
    """Writes the pictures as PNG and JPEG files into a new directory."""
    directory = Path(tempfile.mkdtemp(prefix="fovea-demo-"))
    for name, scene in PICTURES.items():
        render(scene).save(directory / name)
    return directory


def ask(client: Client, directory: Path, question: Question) -> bool:
    """Prints one question with its answer and its costs; whether the answer is the expected one."""
    paths = [directory / name for name in question.pictures]
    answer = client.ask(paths, question.text, temperature=0)
    right = answer.text == question.expected
    print("\n".join(f"  {path}" for path in paths))
    print(f"    {question.text}  ->  {answer.text}{'' if right else f'   WRONG, expected {question.expected}'}")
    print(f"    {costs(answer)}")
    return right


def costs(answer: Answer) -> str:
    images = ", ".join(
        f"{receipt['tokens']} image tokens from {receipt['source']} in {receipt['wait_ms']:.1f} ms"
        for receipt in answer.images
    )
    return f"{images}; answer in {answer.seconds * 1000:.0f} ms"
