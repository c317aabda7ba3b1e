"""What was made before a setting existed is as good as made with the value that stood for it."""

from __future__ import annotations

from dataclasses import asdict, fields

import pytest

from dd_core.errors import RecipeError
from dd_core.models.config import LlamaGenConfig, VARConfig
from training.mismatch import _LATER, differences, refuse_mismatch
from training.recipes.settings import DecoderRecipe, DistillRecipe, TeacherRecipe, TokenizerRecipe

OWNERS = {
    "tokenizer": TokenizerRecipe,
    "decoder": DecoderRecipe,
    "teacher": TeacherRecipe,
    "distill": DistillRecipe,
}


@pytest.mark.parametrize("name", _LATER)
def test_what_stands_for_a_setting_is_its_default(name: str) -> None:
    part, _, field = name.rpartition(".")
    for owner in [OWNERS[part]] if part else [VARConfig, LlamaGenConfig]:
        [default] = [f.default for f in fields(owner) if f.name == field]
        assert default == _LATER[name]


def test_files_of_before_are_good_until_the_setting_is_used() -> None:
    model = asdict(VARConfig())
    old = {k: v for k, v in model.items() if k not in ("text_tokens", "text_dim")}
    for made, wanted in (({"model": old}, {"model": model}), (old, model), (model, old)):
        assert list(differences(made, wanted)) == []
    changed = {"distill": {"steps": 3, "evenness": 0.5}}
    assert list(differences({"distill": {"steps": 3}}, changed)) == [("distill.evenness", "0.0", "0.5")]
    with pytest.raises(RecipeError, match="text_dim was 0 and is 4; again"):
        refuse_mismatch("teacher", old, {**model, "text_dim": 4}, "again")
    assert list(differences({"a": 1}, {"b": 2})) == [("a", "1", "absent"), ("b", "absent", "2")]
