"""`fovea bench scaling`: the number of encoder replicas goes up and down under load, and a ledger says what became of
every request.

Every request asks about a picture that no cache knows, because a few bytes behind its end make it another file; the
answer is compared, byte for byte, with the one to the picture itself before the load began. So a request ends in one
of four ways: right, wrong, refused with an error that says so, or lost.
"""

import io
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy import service
from deploy.bench import report
from deploy.client import Client, ClientError
from deploy.demo import PICTURES, QUESTIONS
from deploy.shapes.scenes import render

LOST_AFTER_S = 120.0
MAX_TOKENS = 16

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """One picture, a question about it, and the answer that was given in peace."""

    picture: bytes
    question: str
    expected: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One request. `outcome` is right, wrong, refused or lost; times are seconds since the drill began."""

    number: int
    sent_s: float
    ended_s: float
    outcome: str
    detail: str = ""


class Ledger:
    """Callers who ask one after another until they are told to stop, each answer beside the one that was expected."""

    def __init__(self, url: str, asked: Sequence[Asked], callers: int) -> None:
        self.entries: list[Entry] = []
        self._client = Client(url)
        self._asked = asked
        self._callers = callers
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self._began = time.monotonic()

    def __enter__(self) -> "Ledger":
        self._client.model()
        self._pool = ThreadPoolExecutor(self._callers)
        self._work = [self._pool.submit(self._call) for _ in range(self._callers)]
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        self._client.close()
        for work in self._work:
            work.result()

    @property
    def now_s(self) -> float:
        return time.monotonic() - self._began

    def _call(self) -> None:
        while not self._stop.is_set():
            number = next(self._numbers)
            sent_s = self.now_s
            outcome, detail = self._ask(number)
            if self.now_s - sent_s > LOST_AFTER_S:
                outcome, detail = "lost", f"no answer within {LOST_AFTER_S:.0f} s"
            self.entries.append(Entry(number, sent_s, self.now_s, outcome, detail))

    def _ask(self, number: int) -> tuple[str, str]:
        asked = self._asked[number % len(self._asked)]
        new_file = asked.picture + f" {self._began} {number}".encode()
        try:
            answer = self._client.ask([new_file], asked.question, temperature=0, max_tokens=MAX_TOKENS)
        except ClientError as exc:
            return "refused", str(exc)
        if answer.text != asked.expected:
            return "wrong", f"{answer.text!r}, expected {asked.expected!r}"
        sources = [receipt["source"] for receipt in answer.images]
        return ("right", "") if sources == ["encoder"] else ("wrong", f"from {sources}")


def run(config: dict[str, Any], counts: Sequence[int], *, callers: int, hold_s: float, output: Path) -> bool:
    """Whether every request was answered right. Prints a row for each number of replicas."""
    began = time.monotonic()

    def progress(line: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {line}")

    with service.running_service(config, progress) as running:
        asked = known_answers(running.url)
        rows, ledger = drill(running, asked, counts, callers=callers, hold_s=hold_s, progress=progress)
    report.show("encoder replicas under load", rows)
    entries = [asdict(entry) for entry in ledger.entries]
    report.write(output, {"circumstances": report.circumstances(), "rows": rows, "ledger": entries})
    return {entry.outcome for entry in ledger.entries} == {"right"}


def known_answers(url: str) -> list[Asked]:
    """The demo's pictures and questions about one of them, with what the service says now."""
    files = {}
    for name, scene in PICTURES.items():
        buffer = io.BytesIO()
        render(scene).save(buffer, "PNG" if name.endswith(".png") else "JPEG")
        files[name] = buffer.getvalue()
    single = [(files[question.pictures[0]], question.text) for question in QUESTIONS if len(question.pictures) == 1]
    with Client(url) as client:
        answers = [client.ask([picture], text, temperature=0, max_tokens=MAX_TOKENS) for picture, text in single]
    return [Asked(picture, text, answer.text) for (picture, text), answer in zip(single, answers, strict=True)]


def drill(
    running: service.RunningService,
    asked: Sequence[Asked],
    counts: Sequence[int],
    *,
    callers: int,
    hold_s: float,
    progress: Report,
) -> tuple[list[dict[str, Any]], Ledger]:
    """A row for each of the `counts`, from the command that asks for it until it was held for `hold_s`."""
    dashboard = service.connect(running.dashboard)
    phases: list[tuple[int, float]] = []
    with Ledger(running.url, asked, callers) as ledger:
        for count in counts:
            phases.append((count, ledger.now_s))
            service.scale(dashboard, "encoder", count)
            service.wait_until_scaled(dashboard, "encoder", count, progress)
            time.sleep(hold_s)
    ends = [began for _, began in phases[1:]] + [ledger.now_s]
    rows = [_row(ledger, count, began, end) for (count, began), end in zip(phases, ends, strict=True)]
    return rows, ledger


def _row(ledger: Ledger, count: int, began: float, end: float) -> dict[str, Any]:
    """The requests that were sent in one phase."""
    sent = [entry for entry in ledger.entries if began <= entry.sent_s < end]
    outcomes = Counter(entry.outcome for entry in sent)
    took = [entry.ended_s - entry.sent_s for entry in sent] or [0.0]
    return {
        "replicas": count,
        "seconds": end - began,
        "requests": len(sent),
        **{outcome: outcomes[outcome] for outcome in ("right", "wrong", "refused", "lost")},
        "p50 ms": report.percentile(took, 50) * 1000,
        "p99 ms": report.percentile(took, 99) * 1000,
        "longest ms": max(took) * 1000,
        "details": json.dumps(sorted({entry.detail for entry in sent if entry.detail})[:3]),
    }
