"""`fovea chat`: a conversation about pictures in the terminal."""

import contextlib
import re
import readline  # noqa: F401  # gives input() a history and editing
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.client import Client, ClientError, user_message

HELP = """\
  Name a picture's path anywhere in a question, quoted if it has spaces. A path alone waits for a question.
  /new       forget the conversation        /drop   forget pictures that wait
  /quit      leave (also Ctrl-D)            Ctrl-C  stops an answer"""

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}
_PUNCTUATION = "?!.,;:"


class Conversation:
    """What was said so far, and the pictures of the next question."""

    def __init__(self, client: Client, system: str | None, max_tokens: int | None) -> None:
        self._client = client
        self._first: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self._max_tokens = max_tokens
        self._messages = list(self._first)
        self._paths: list[Path] = []  # of all pictures, in the order of the receipts
        self.waiting: list[Path] = []

    def forget(self) -> None:
        self._messages, self._paths, self.waiting = list(self._first), [], []

    def ask(self, question: str) -> None:
        """Prints the answer as it comes, and what the new pictures cost. A question that fails is as if never asked."""
        messages = [*self._messages, user_message(self.waiting, question)]
        answer = self._client.chat(messages, max_tokens=self._max_tokens, print_text=True)
        self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        num_known = len(self._paths)
        self._paths += self.waiting
        self.waiting = []
        for path, receipt in list(zip(self._paths, answer.images, strict=True))[num_known:]:
            print(f"  {path}: {receipt['tokens']} tokens from {receipt['source']} in {receipt['wait_ms']:.1f} ms")
        found = sum(receipt["source"] != "encoder" for receipt in answer.images)
        cached = f", {found} of {len(answer.images)} pictures from the cache" if answer.images else ""
        print(f"  {answer.num_tokens} tokens in {answer.seconds * 1000:.0f} ms{cached}")


def run(client: Client, images: Sequence[Path], *, system: str | None, max_tokens: int | None) -> None:
    """Until /quit or Ctrl-D. Raises ClientError if there is no service at all."""
    print(f"{client.model()} - /help says what can be typed")
    conversation = Conversation(client, system, max_tokens)
    wait_for(conversation, images)
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if line == "/quit":
            return
        with contextlib.suppress(KeyboardInterrupt):
            try:
                answer(conversation, line)
            except ClientError as exc:
                print(f"  {exc}")


def answer(conversation: Conversation, line: str) -> None:
    """Does what one line says."""
    if line == "/new":
        conversation.forget()
    elif line == "/drop":
        conversation.waiting = []
    elif line == "/help":
        print(HELP)
    elif re.fullmatch(r"/\w+", line):
        print(f"  {line} is not a command; /help says what can be typed")
    else:
        paths, question = pictures_in(line)
        wait_for(conversation, paths)
        if question:
            conversation.ask(question)


def wait_for(conversation: Conversation, paths: Sequence[Path]) -> None:
    for path in paths:
        if not path.is_file():
            raise ClientError(f"{path}: no such file")
    conversation.waiting += paths
    if paths:
        print("  " + ", ".join(path.name for path in conversation.waiting) + " will be sent with the question")


def pictures_in(line: str) -> tuple[list[Path], str]:
    """The words of a line that look like paths of pictures, and the rest. Terminals quote a path that is dropped."""
    try:
        words = shlex.split(line)
    except ValueError:  # an apostrophe is not a quote
        words = line.split()
    pictures = [word for word in words if _is_picture(word)]
    paths = [Path(word.rstrip(_PUNCTUATION)).expanduser() for word in pictures]
    return paths, " ".join(word for word in words if word not in pictures) if paths else line


def _is_picture(word: str) -> bool:
    return Path(word.rstrip(_PUNCTUATION)).suffix.lower() in _SUFFIXES
