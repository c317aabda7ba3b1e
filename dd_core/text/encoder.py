"""The interface of text encoders, and the part that all of them share.

    prompts ─▶ checked ─▶ cache by prompt ─▶ states of one prompt at a time ─▶ left-padded batch

A prompt is encoded alone, whatever it came with: its states are the same bytes in every batch, as an
image's are. Repeats cost nothing, since the last `cache` prompts are kept.

Shapes: B prompts, T positions, n positions that a prompt fills, N state dimension.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Protocol
from unicodedata import category

import torch
from torch import Tensor

from dd_core.condition import TextCondition
from dd_core.errors import InvalidRequestError

MAX_CHARACTERS = 1_000


class TextEncoder(Protocol):
    """Prompts → a condition, one row a prompt."""

    @property
    def length(self) -> int:
        """T, the positions of a condition."""

    @property
    def dim(self) -> int:
        """N, the size of a state."""

    def load(self) -> None:
        """Fetch and load now what would be loaded with the first prompt.

        Raises:
            EncoderError: it cannot be had.
        """

    def encode(self, prompts: Sequence[str]) -> TextCondition:
        """States `[B, T, N]` float32, left-padded, and their mask, on the encoder's device.

        Raises:
            InvalidRequestError: no prompts, or one that is empty or too long.
        """


def checked_prompt(prompt: object) -> str:
    """The prompt with each run of blanks and control characters as one space.

    Raises:
        InvalidRequestError: not a text, nothing in it, or over `MAX_CHARACTERS`.
    """
    if not isinstance(prompt, str):
        raise InvalidRequestError(f"a prompt is a text, not {type(prompt).__name__}", param="prompt")
    if len(prompt) > MAX_CHARACTERS:
        raise InvalidRequestError(
            f"the prompt has {len(prompt)} characters, the most is {MAX_CHARACTERS}", param="prompt"
        )
    # Control characters are blanks too: they are no words, and six bytes each in JSON.
    text = " ".join("".join(" " if category(c) == "Cc" else c for c in prompt).split())
    if all(category(c) in ("Cf", "Zs") for c in text):  # joiners and marks of direction alone say nothing
        raise InvalidRequestError("the prompt is empty", param="prompt")
    return text


def padded_states(states_nN: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """States of one prompt moved to the end of `length` positions, and the mask: `[T, N]`, `[T]`."""
    idle = length - len(states_nN)
    assert idle >= 0, "an encoder truncates"
    mask = torch.arange(length, device=states_nN.device) >= idle
    return torch.nn.functional.pad(states_nN, (0, 0, idle, 0)), mask


def padded_batch(states: Sequence[Tensor], length: int) -> TextCondition:
    """A condition of several prompts' states, `[n, N]` each: a row a prompt, as `padded_states` makes it."""
    rows = [padded_states(each, length) for each in states]
    return TextCondition(torch.stack([s for s, _ in rows]), torch.stack([m for _, m in rows]))


class PromptEncoder:
    """A `TextEncoder` from a function of one prompt; safe to call from several threads.

    Args:
        compute: a checked prompt → its states `[n, N]` float32, n ≤ `length`.
        cache: how many prompts' states are kept; the one that was not asked for the longest goes first.
        load: loads what `compute` needs, where that is not there from the start.
    """

    def __init__(
        self,
        compute: Callable[[str], Tensor],
        length: int,
        dim: int,
        cache: int = 512,
        load: Callable[[], None] | None = None,
    ) -> None:
        self.compute, self._length, self._dim, self._size = compute, length, dim, cache
        self._load = load
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = Lock()

    @property
    def length(self) -> int:
        return self._length

    @property
    def dim(self) -> int:
        return self._dim

    def load(self) -> None:
        if self._load is not None:
            self._load()

    def encode(self, prompts: Sequence[str]) -> TextCondition:
        if not prompts or isinstance(prompts, str):
            raise InvalidRequestError("prompts are a list of one or more texts", param="prompt")
        texts = [checked_prompt(p) for p in prompts]
        found = {text: self._states(text) for text in dict.fromkeys(texts)}
        return padded_batch([found[text] for text in texts], self._length)

    def _states(self, text: str) -> Tensor:
        with self._lock:
            if text in self._known:
                self._known.move_to_end(text)
                return self._known[text]
            states = self.compute(text)
            self._known[text] = states
            while len(self._known) > self._size:
                self._known.popitem(last=False)
            return states
