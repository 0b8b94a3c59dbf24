"""Token ids to text, a few at a time, never ending inside a character."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class IncrementalDetokenizer:
    """The text of one answer. Holds back bytes of an unfinished character and text that may become a stop string.

    A character that is still unfinished at the end of the answer is dropped.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = [string for string in stop if string]
        self._held = ""
        self.stopped = False

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now. Sets `stopped`, and ends the text before it, when a stop string appears."""
        if self.stopped:
            return ""
        for token_id in token_ids:
            self._held += self._stream.step(self._tokenizer, token_id) or ""
        found = [index for index in map(self._held.find, self._stop) if index >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
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
