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

from collections.abc import Callable

from training.run import Run
from training.stages import decoder, distill, evaluate, pairs, teacher, tokenizer

# Those of `dd-train all`. Pairs that begin with a student's tokens are for runs that have one to start from.
STAGES: dict[str, Callable[[Run], object]] = {
    "tokenizer": tokenizer.run,
    "teacher": teacher.run,
    "pairs": pairs.run,
    "decoder": decoder.run,
    "distill": distill.run,
    "evaluate": evaluate.run,
}
