"""What each jump of the student costs: from the teacher's tokens, and from its own.

A later jump is trained from X_t of the teacher's pairs, and at sampling begins with the student's own
tokens. The teacher's continuation of those is what it should then have made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dd_core.plan import Plan, Segment
from training.diagnose.finding import RULES, Finding, judged
from training.diagnose.student import Scores, difference


def continuation(num_blocks: int, steps: Sequence[int], step: int) -> Plan:
    """Jumps of the student up to `step`, one of its `steps`, and the teacher from there by Algorithm 1."""
    stops = [t for t in steps if 0 < t <= step]
    jumps = zip([0, *stops[:-1]], stops, strict=True)
    segments = [Segment("student", start, stop) for start, stop in jumps]
    return Plan("continuation", (*segments, Segment("teacher", step, num_blocks)), draw="flow")


def jumps(true: Mapping[int, Scores], own: Mapping[int, Scores]) -> Finding:
    """Nats a token of each jump, on the blocks that it keeps.

    Args:
        true: by step, from X_t of fresh pairs.
        own: by later step, from the student's own X_t, on the teacher's continuation of it. Pair i of both
            has one condition and one noise.
    """
    steps = sorted(true)
    layout = true[steps[0]].layout
    parts, found, trouble = [], [], False
    for step, stop in zip(steps, [*steps[1:], layout.num_blocks], strict=True):
        kept = true[step].of_pairs(step, stop)
        entry: dict[str, Any] = {
            "start": step,
            "stop": stop,
            "nats": float(kept.mean()),
            "accuracy": true[step].accuracy(step, stop),
        }
        said = f"the jump {step}→{stop} {kept.mean():.2f}"
        if step in own:
            mine = own[step].of_pairs(step, stop)
            gap, error = difference(mine, kept)
            trouble |= gap > max(RULES["jumps"].limit, 2 * error)
            alone = float(true[steps[0]].of_pairs(step, stop).mean())
            entry |= {"own_nats": float(mine.mean()), "gap": gap, "gap_error": error, "one_step_nats": alone}
            said += (
                f" from the teacher's tokens and {mine.mean():.2f} from its own (± {error:.2f}), where one "
                f"step has {alone:.2f}"
            )
        parts.append(said)
        found.append(entry)
    says = f"Nats a token of fresh pairs: {'; '.join(parts)}."
    return judged("jumps", says, {"jumps": found}, trouble)


def jumps_in_fid(fids: Mapping[str, float], step: int) -> str:
    """The same in FID, where an evaluation has the plans; "" where it has not.

    Args:
        fids: of plans by name.
        step: the second of two training steps.
    """
    hybrid = f"pre-trained-1-{step + 1}"  # the teacher up to the second jump
    if not {"teacher", "dd-1", "dd-2", hybrid} <= fids.keys():
        return ""
    teacher, second, both, one = (fids[name] for name in ("teacher", hybrid, "dd-2", "dd-1"))
    return (
        f" In FID: teacher {teacher:.1f}; {second - teacher:+.1f} by the second jump, {both - second:+.1f} "
        f"by the first one before it; one step {one:.1f}."
    )
