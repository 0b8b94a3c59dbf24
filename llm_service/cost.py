"""What things have cost of late, so that a request can be told what it would cost."""

from collections import defaultdict


class CostModel:
    """Milliseconds for tokens, by what was done with them; the last few hundred weigh most."""

    _MEMORY = 0.98  # what is left of an observation when the next one comes

    def __init__(self) -> None:
        self._ms: defaultdict[str, float] = defaultdict(float)
        self._tokens: defaultdict[str, float] = defaultdict(float)

    def note(self, what: str, num_tokens: int, ms: float) -> None:
        self._ms[what] = self._ms[what] * self._MEMORY + ms
        self._tokens[what] = self._tokens[what] * self._MEMORY + num_tokens

    def predict(self, what: str, num_tokens: int) -> float | None:
        """None until something like it was seen."""
        return self._ms[what] * num_tokens / self._tokens[what] if self._tokens[what] else None
