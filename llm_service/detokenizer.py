"""Token ids to text, a few at a time, never ending inside a character."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase


class IncrementalDetokenizer:
    """The text of one answer. Holds back bytes of an unfinished character and text that may become a stop string.

    A character that is still unfinished at the end of the answer is dropped.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stop = [string for string in stop if string]
        self._held = ""
        self.stop_string: str | None = None

    @property
    def stopped(self) -> bool:
        return self.stop_string is not None

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now. When a stop string appears, sets `stop_string` and ends the text before it."""
        if self.stopped:
            return ""
        for token_id in token_ids:
            self._held += self._stream.step(self._tokenizer, token_id) or ""
        found = [(index, string) for string in self._stop if (index := self._held.find(string)) >= 0]
        if found:
            index, self.stop_string = min(found)
            return self._held[:index]
        certain = len(self._held) - self._num_held_back()
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def flush(self) -> str:
        """What was held back in case it became a stop string, once no more tokens follow."""
        text, self._held = self._held, ""
        return "" if self.stopped else text

    def _num_held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(string) for string in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-length:]) for string in self._stop):
                return length
        return 0


class TokenTexts:
    """What single tokens of a byte-level tokenizer stand for: their bytes, which need not be whole characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        self._byte_of = _bytes_of_characters()

    def __call__(self, token_id: int) -> bytes:
        """Empty for an id that only pads the vocabulary."""
        token = self._tokenizer.id_to_token(token_id) or ""
        return token.encode() if token_id in self._special else bytes(self._byte_of[character] for character in token)


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: a byte that is printable in Latin-1 is its own character, the others follow from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
    assert table.keys() == set(ByteLevel.alphabet())
    return table
