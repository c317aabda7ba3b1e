"""FLAN-T5's route: cleaning, the extra, and states by a tiny T5 (skipped where transformers is not there)."""

from __future__ import annotations

import sys

import pytest
import torch

from dd_core.errors import EncoderError, InvalidRequestError
from dd_core.text.clean import clean_caption
from dd_core.text.config import T5Config
from dd_core.text.encoder import PromptEncoder
from dd_core.text.t5 import T5States
from tests.dd_core.small_text import pieces_file

CPU = torch.device("cpu")
T5 = T5Config(repo="local/tiny", length=6, dim=16)


@pytest.fixture(scope="module")
def states() -> T5States:
    transformers = pytest.importorskip("transformers", reason="the extra t5 is not installed")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 16}
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
    from tokenizers import Tokenizer

    pieces = Tokenizer.from_buffer(pieces_file())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]")
    return T5States(T5, CPU, model=model, tokenizer=tokenizer)


def test_states_are_those_of_the_padded_prompt_of_the_reference(states: T5States) -> None:
    """The reference pads to the right, masks, and takes the valid rows; ours encodes without padding."""
    ids = states._tokenizer("red cat")["input_ids"]
    pad = T5.length - len(ids)
    padded, mask = torch.tensor([ids + [0] * pad]), torch.tensor([[1] * len(ids) + [0] * pad])
    with torch.inference_mode():
        theirs = states._model(input_ids=padded, attention_mask=mask).last_hidden_state[0, : len(ids)]
    torch.testing.assert_close(states("red cat"), theirs, rtol=1e-4, atol=1e-5)


def test_a_condition_is_left_padded_cut_and_the_same_in_every_batch(states: T5States) -> None:
    encoder = PromptEncoder(states, T5.length, T5.dim)
    cond = encoder.encode(["red cat", "a red cat and a blue dog and a cat", "Red CAT!"])
    assert cond.states_BTN.shape == (3, 6, 16) and cond.mask_BT.sum(1).tolist() == [4, 6, 5]
    assert (cond.states_BTN[~cond.mask_BT] == 0).all()
    other = PromptEncoder(states, T5.length, T5.dim).encode(["red cat"])
    assert torch.equal(other.states_BTN[0], cond.states_BTN[0])


def test_many_prompts_together_have_the_states_of_each_alone(states: T5States) -> None:
    prompts = ["red cat", "a red cat and a blue dog and a cat", "dog"]
    for together, prompt in zip(states.many(prompts), prompts, strict=True):
        torch.testing.assert_close(together, states(prompt), rtol=1e-4, atol=1e-5)


def test_a_prompt_of_which_nothing_is_left_is_refused(states: T5States) -> None:
    with pytest.raises(InvalidRequestError, match="nothing") as refused:
        states("https://example.com/a.png @someone")
    assert refused.value.param == "prompt"


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EncoderError, match=r"distilled-decoding\[t5\]"):
        T5States(T5, CPU)("a cat")


def test_weights_that_cannot_be_had_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra t5 is not installed")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no such repository")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(EncoderError, match="local/tiny could not be loaded: no such"):
        T5States(T5, CPU)("a cat")


@pytest.mark.parametrize(
    "wrong", [{"repo": "../etc/x"}, {"repo": "a b/c"}, {"revision": "x/y"}, {"length": 0}]
)
def test_a_manifest_cannot_name_what_is_no_repository(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no repository|positive"):
        T5Config(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("caption", "clean"),
    [
        ("A blue Porsche 356", "a blue porsche 356"),
        ("“Smart”  — quotes", '"smart" - quotes'),
        ("see www.example.com/x now #123", "see now"),
        ("<b>bold</b> 你好 cat img_01.png", "bold cat"),
        ("free shipping: red_cat", "red_cat"),
        ("", ""),
        ("<![1] cat", "<! 1 cat"),
        ("<![x[ cat ]]> dog", "dog"),
    ],
)
def test_captions_are_cleaned(caption: str, clean: str) -> None:
    assert clean_caption(caption) == clean
