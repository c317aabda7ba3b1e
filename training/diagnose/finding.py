"""Findings of a diagnosis: what was measured, whether it is past its limit, and what to do.

A limit lies between runs that had the trouble and runs that had not, as far as docs/lab-notes.md has both; it
is a guess for `teacher`, `floor` and `frequency`, of which only one side was seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rule:
    """A limit, and a sentence of advice on either side of it.

    Args:
        limit: in the unit of the finding's first number that it is held against.
        unit: what the limit is of, for the docs.
    """

    limit: float
    unit: str
    good: str
    bad: str


RULES: dict[str, Rule] = {
    "codebook": Rule(
        0.9,
        "least share of the codes that occur",
        "Nothing to do.",
        "Codes that never occur are lost: the encoder's outputs came together before the decoder had spread "
        "them. Train the tokenizer anew with a larger tokenizer.continuous_for, or with a smaller codebook.",
    ),
    "evenness": Rule(
        0.1,
        "least perplexity of the codes, as a share of them",
        "Nothing to do.",
        "A few codes draw nearly everything: the pictures are near one grey. Train the tokenizer anew with a "
        "larger tokenizer.continuous_for, and look at tokenizer-samples.png.",
    ),
    "floor": Rule(
        0.8,
        "most FID of reconstructions, as a share of the teacher's",
        "The tokenizer leaves room: the teacher and the student are what to train.",
        "The tokenizer is the bottleneck: no sampler passes its reconstructions. Train the decoder on "
        "against its discriminator (decoder.steps=+2400), which keeps the codes and what was made of them.",
    ),
    "teacher": Rule(
        0.3,
        "most nats a token between held-out and training images",
        "The teacher has not learned its images by heart: more steps or a wider one can still gain.",
        "The teacher learns its images by heart. More steps gain little: it needs more images (mirror=true "
        "doubles them), a smaller model, or weights to begin from (begin_from).",
    ),
    "condition": Rule(
        0.6,
        "least share of images that are likelier under their own condition than under another's; a coin: 0.5",
        "The teacher reads its condition.",
        "The teacher hardly reads its condition, and FID does not tell. Train it longer before any pair is "
        "made (teacher.steps=+2000), and check the folders or captions of the images.",
    ),
    "memorisation": Rule(
        0.1,
        "most nats a token between fresh pairs and those that it learns from",
        "The student knows fresh pairs as well as its own: more steps can still gain, more pairs will not.",
        "The student learns its pairs by heart, so more steps gain nothing. Begin another run from this "
        "one's bundle with another seed, more pairs (pairs.count) and distill.start=student.",
    ),
    "frequency": Rule(
        1.2,
        "least accuracy in one step, as a multiple of what guessing each place's commonest token has",
        "The student has learned more than how often a token occurs.",
        "The student knows little more than how often tokens occur. Train it longer (distill.steps=+2000); "
        "if its cross entropy does not fall at all, with a lower distill.lr and distill.matrix_lr.",
    ),
    "positions": Rule(
        0.25,
        "least accuracy in one step",
        "Enough tokens are right for them to go together.",
        "With so few tokens right the student guesses each place alone, and the tokens need not go together. "
        "A last leg with distill.adversarial=1.0 on the decoded picture gained the most here.",
    ),
    "jumps": Rule(
        0.1,
        "most nats a token between a later jump from the student's own tokens and from the teacher's",
        "The later jump does nearly as well from the student's own tokens: the first one is what to better.",
        "The later jump meets tokens that it was not trained on. Pairs that the student begins (pairs.own, "
        "dd-train own-pairs) close part of it; a discriminator on the picture gained more in FID.",
    ),
    "numbers": Rule(
        0,
        "most logged figures that are no numbers",
        "Nothing to do.",
        "The loss is no number any more: begin the stage anew with half of its lr and matrix_lr.",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One thing that a diagnosis looked at.

    Args:
        name: of the finding, for machines.
        says: what was measured, in a sentence.
        numbers: the figures behind it, as JSON has them.
        trouble: past its limit; None where nothing could be judged.
        advice: what to do, in a sentence or two.
    """

    name: str
    says: str
    numbers: dict[str, Any] = field(default_factory=dict)
    trouble: bool | None = None
    advice: str = ""


def judged(name: str, says: str, numbers: dict[str, Any], trouble: bool, rule: str = "") -> Finding:
    """A finding with the advice of `rule`, by default the one of its name."""
    chosen = RULES[rule or name]
    return Finding(name, says, numbers, trouble, chosen.bad if trouble else chosen.good)


def not_measured(name: str, why: str) -> Finding:
    """A finding that is none, and why."""
    return Finding(name, f"not measured: {why}")
