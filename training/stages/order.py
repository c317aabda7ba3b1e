"""The stages in order, over one run folder; each reads what the earlier ones left there.

start     ─▶ tokenizer, teacher, first-student and tokens.safetensors of a bundle (instead of training them)
tokenizer ─▶ tokenizer.safetensors, tokens.safetensors
teacher   ─▶ teacher.safetensors
pairs     ─▶ pairs/
decoder   ─▶ decoder.safetensors: the tokenizer that draws; same codes, so nothing else waits for it
own-pairs ─▶ own-pairs/: begun by first-student, gone on with by the teacher
distill   ─▶ student.safetensors
evaluate  ─▶ evaluation.json, evaluation.md, pictures
export    ─▶ a bundle of what they leave
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from training.run import Run, given
from training.stages import decoder, distill, evaluate, pairs, teacher, tokenizer

log = logging.getLogger("dd_train")

# Those of `dd-train all`. Pairs that begin with a student's tokens are for runs that have one to start from.
STAGES: dict[str, Callable[[Run], object]] = {
    "tokenizer": tokenizer.run,
    "teacher": teacher.run,
    "pairs": pairs.run,
    "decoder": decoder.run,
    "distill": distill.run,
    "evaluate": evaluate.run,
}


def run_all(run: Run) -> None:
    """Every stage from where it stopped, but for models that the run was given."""
    for name, stage in STAGES.items():
        if given(run, name):
            log.info("%s: %s.safetensors was not trained here, and stays", name, name)
        else:
            stage(run)
