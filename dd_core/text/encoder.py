"""The part that all text encoders share.

    prompts ─▶ checked ─▶ cache by prompt ─▶ states of one prompt at a time ─▶ left-padded batch

A prompt is encoded alone, whatever it came with: its states are the same bytes in every batch, as an
image's are. Repeats cost nothing, since the last `cache` prompts are kept.

Shapes: B prompts, T positions, n positions that a prompt fills, N state dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from threading import Lock
from unicodedata import category

import torch
from torch import Tensor

from dd_core.condition import TextCondition
from dd_core.errors import InvalidRequestError

MAX_CHARACTERS = 1_000


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
    """Prompts → a condition, one row a prompt; safe to call from several threads.

    Args:
        compute: a checked prompt → its states `[n, N]` float32, n ≤ `length`.
        length, dim: T and N of the condition.
        cache: how many prompts' states are kept; the one that was not asked for the longest goes first.
        load: fetches and loads now what `compute` would load with the first prompt, where that is not there
            from the start; raises EncoderError where it cannot be had.
    """

    def __init__(
        self,
        compute: Callable[[str], Tensor],
        length: int,
        dim: int,
        cache: int = 512,
        load: Callable[[], None] = lambda: None,
    ) -> None:
        self.compute, self.length, self.dim, self.load = compute, length, dim, load
        self._states = lru_cache(cache)(compute)
        self._lock = Lock()

    def encode(self, prompts: Sequence[str]) -> TextCondition:
        """States `[B, T, N]` float32, left-padded, and their mask, on the encoder's device.

        Raises:
            InvalidRequestError: no prompts, or one that is empty or too long.
        """
        if not prompts or isinstance(prompts, str):
            raise InvalidRequestError("prompts are a list of one or more texts", param="prompt")
        states = []
        for text in [checked_prompt(p) for p in prompts]:
            with self._lock:
                states.append(self._states(text))
        return padded_batch(states, self.length)
