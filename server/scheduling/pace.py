"""The pace of work: the time from one pass to the next beside that of the passes themselves."""

from __future__ import annotations

from dataclasses import dataclass

from server.scheduling.costs import CostTable

# Weight of a new measurement of the slowdown, and the most that one may say.
_SLOWDOWN_WEIGHT = 0.1
_MAX_SLOWDOWN = 4.0
_PROMPT_WEIGHT = 0.1  # of a new measurement of a prompt's encoding


@dataclass(eq=False)
class Pace:
    """Moving averages, told of the end of every pass."""

    costs: CostTable  # is told of the gaps between passes
    prompt_s: float = 0.0  # seconds that a prompt's encoding takes

    def __post_init__(self) -> None:
        self._slowdown = 1.0
        self._busy_since: float | None = None  # end of the last pass, if more was waiting then

    @property
    def slowdown(self) -> float:
        """Time that passes while work is done ÷ time forecast for it."""
        return max(1.0, self._slowdown)

    @property
    def busy(self) -> bool:
        """True if the time since the last pass will be that of the next one."""
        return self._busy_since is not None

    def interrupted(self) -> None:
        """Note that the device did something else: the time since the last pass is not that of a pass."""
        self._busy_since = None

    def encoded(self, prompts: int, seconds: float) -> None:
        """Note the time that new prompts of a pass took."""
        weight = _PROMPT_WEIGHT if self.prompt_s else 1.0
        self.prompt_s += weight * (seconds / prompts - self.prompt_s)

    def ended(
        self, now: float, *, more: bool, ahead: bool, passing: float, text: float, expected: float
    ) -> None:
        """Note the end of a pass.

        Args:
            more: other work waits.
            ahead: it was sent while the one before it ran.
            passing: seconds of the pass and of decoding after it.
            text: seconds of prompts before it.
            expected: seconds that a forecast has for it; 0 where these are not those of one pass.
        """
        if self._busy_since is not None:
            took = now - self._busy_since
            if expected > 0:
                # An answer that is read late makes the time to that of a pass sent ahead as much too short.
                measured = min(_MAX_SLOWDOWN, max(0.0 if ahead else 1.0, took / expected))
                self._slowdown += _SLOWDOWN_WEIGHT * (measured - self._slowdown)
            if not ahead:
                self.costs.observe_gap(took - passing - text, passing)
        self._busy_since = now if more else None
