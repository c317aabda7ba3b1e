"""Prompts become the same states alone and in any batch, and what cannot be a prompt is refused."""

from __future__ import annotations

import threading

import pytest
import torch
from tokenizers import Tokenizer

from dd_core.errors import InvalidRequestError, WeightsError
from dd_core.text.config import MiniLMConfig
from dd_core.text.encoder import MAX_CHARACTERS, PromptEncoder
from dd_core.text.minilm import MiniLM, MiniLMStates, adapt_minilm, read_tokenizer, spoken
from tests.dd_core.small_text import TEXT, pieces_file, small_text

PROMPTS = ["red heart", "a cat", "red", "a red cat and a blue heart and a dog and a cat"]


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    module, pieces = small_text()
    states = MiniLMStates(module, read_tokenizer(pieces, TEXT, "pieces"))
    return PromptEncoder(states, TEXT.length, TEXT.dim, cache=3)


def test_a_prompt_has_the_same_states_alone_in_any_batch_and_from_the_cache(encoder: PromptEncoder) -> None:
    together = encoder.encode(PROMPTS)
    for i in (3, 0, 2, 1, 1):
        alone = encoder.encode([PROMPTS[i]])
        assert torch.equal(alone.states_BTN[0], together.states_BTN[i])
        assert torch.equal(alone.mask_BT[0], together.mask_BT[i])
    twice = encoder.encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert torch.equal(twice.states_BTN[0], together.states_BTN[1])
    assert torch.equal(twice.states_BTN[2], twice.states_BTN[0])


def test_states_are_left_padded_with_zeros(encoder: PromptEncoder) -> None:
    cond = encoder.encode(PROMPTS)
    assert cond.states_BTN.shape == (4, TEXT.length, TEXT.dim) and cond.states_BTN.dtype == torch.float32
    assert cond.mask_BT.sum(1).tolist() == [4, 4, 3, TEXT.length]  # [CLS] and [SEP] count
    assert cond.mask_BT[:, -1].all() and (cond.mask_BT.int().diff(dim=1) >= 0).all()
    assert (cond.states_BTN[~cond.mask_BT] == 0).all()
    assert (cond.states_BTN[cond.mask_BT].abs().sum(1) > 0).all()


def test_a_long_prompt_is_cut_at_its_end(encoder: PromptEncoder) -> None:
    """What comes after the last position changes nothing; what comes before it does."""
    words = ["red", "cat", "dog", "blue", "heart", "a", "red", "cat"]
    one, two = encoder.encode([" ".join(words), " ".join([*words, "dog", "dog"])]).states_BTN
    assert torch.equal(one, two)
    assert not torch.equal(encoder.encode([" ".join(["blue", *words[1:]])]).states_BTN[0], one)


def test_blanks_do_not_matter(encoder: PromptEncoder) -> None:
    one, two = encoder.encode(["red heart", "  red \n heart "]).states_BTN
    assert torch.equal(one, two)


def test_an_emoji_is_read_by_its_name(encoder: PromptEncoder) -> None:
    one, two = encoder.encode(["a \N{CAT}\N{DOG}", "a cat dog"]).states_BTN
    assert torch.equal(one, two)
    assert spoken("my \N{HEAVY BLACK HEART}, \N{SNOWMAN}").split() == ["my", "red", "heart", ",", "snowman"]
    assert spoken("$5 + 5% — naïve 猫") == "$5 + 5% — naïve 猫"


@pytest.mark.parametrize(
    "prompts",
    [[""], ["a cat", " \n\t "], [], "a cat", [7], ["x" * (MAX_CHARACTERS + 1)], ["\u200b\ufeff \u200d"]],
)
def test_what_is_no_prompt_is_refused_by_name(encoder: PromptEncoder, prompts: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        encoder.encode(prompts)
    assert refused.value.param == "prompt"


def test_the_cache_is_bounded_and_forgets_the_oldest() -> None:
    asked: list[str] = []

    def compute(prompt: str) -> torch.Tensor:
        asked.append(prompt)
        return torch.ones(1, 2)

    encoder = PromptEncoder(compute, 4, 2, cache=2)
    encoder.encode(["a", "b"])
    encoder.encode(["a"])  # now b is the oldest
    encoder.encode(["c"])
    encoder.encode(["a", "c"])
    assert asked == ["a", "b", "c"]
    encoder.encode(["b"])
    assert asked == ["a", "b", "c", "b"] and encoder._states.cache_info().currsize == 2
    encoder.encode(["p", "q", "r", "s"])  # more at once than are kept
    assert encoder._states.cache_info().currsize == 2


def test_threads_get_what_one_thread_gets(encoder: PromptEncoder) -> None:
    expected = encoder.encode(PROMPTS).states_BTN
    found: list[bool] = []

    def ask() -> None:
        found.extend(torch.equal(encoder.encode(PROMPTS).states_BTN, expected) for _ in range(10))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 40 and all(found)


def test_bulk_encoding_agrees_to_rounding(encoder: PromptEncoder) -> None:
    states = encoder.compute
    assert isinstance(states, MiniLMStates)
    for prompt, many in zip(PROMPTS, states.many(PROMPTS, batch=2), strict=True):
        torch.testing.assert_close(many, states(prompt), rtol=1e-4, atol=1e-5)


def test_the_arithmetic_is_berts(encoder: PromptEncoder) -> None:
    """Against the same layer written out: scores over √(head dimension), norm after adding."""
    module, _ = small_text()
    ids = torch.tensor([[2, 5, 6, 3]])
    x = module.words.weight[ids[0]] + module.places.weight[:4] + module.kind
    x = torch.nn.functional.layer_norm(x, (TEXT.dim,), module.norm.weight, module.norm.bias, TEXT.norm_eps)
    for layer in module.layers:
        heads = []
        for h in torch.arange(TEXT.dim).split(TEXT.dim // TEXT.heads):
            q, k, v = (f(x)[:, h] for f in (layer.query, layer.key, layer.value))
            heads.append((q @ k.T / len(h) ** 0.5).softmax(-1) @ v)
        x = layer.attention_norm(x + layer.out(torch.cat(heads, 1)))
        x = layer.norm(x + layer.down(torch.nn.functional.gelu(layer.up(x))))
    torch.testing.assert_close(module(ids)[0], x, rtol=1e-5, atol=1e-5)


def test_a_bert_checkpoint_is_adapted_key_by_key() -> None:
    module, _ = small_text()
    state = module.state_dict()
    bert = {
        "embeddings.word_embeddings.weight": state["words.weight"],
        "embeddings.position_embeddings.weight": torch.cat([state["places.weight"], torch.ones(5, TEXT.dim)]),
        "embeddings.token_type_embeddings.weight": torch.stack([state["kind"], torch.ones(TEXT.dim)]),
        "embeddings.position_ids": torch.arange(9),
        "pooler.dense.bias": torch.ones(2),
    }
    names = {
        "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
        "out": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm",
    }  # fmt: skip
    for end in ("weight", "bias"):
        bert[f"embeddings.LayerNorm.{end}"] = state[f"norm.{end}"]
        for k in range(TEXT.layers):
            for ours, theirs in names.items():
                bert[f"encoder.layer.{k}.{theirs}.{end}"] = state[f"layers.{k}.{ours}.{end}"]
    adapted = adapt_minilm(bert, TEXT.length)
    assert adapted.state.keys() == state.keys()
    assert all(torch.equal(adapted.state[k], v) for k, v in state.items())
    with pytest.raises(WeightsError, match=r"decoder\.bias"):
        adapt_minilm({**bert, "decoder.bias": torch.ones(2)}, TEXT.length)


def test_a_damaged_or_foreign_tokenizer_is_refused() -> None:
    for data in (b"", b"{}", b'{"version": 7', pieces_file()[:200]):
        with pytest.raises(WeightsError) as refused:
            read_tokenizer(data, TEXT, "tokenizer.json")
        assert refused.value.param == "tokenizer.json"
    with pytest.raises(WeightsError, match="numbered to"):
        read_tokenizer(pieces_file(), MiniLMConfig(length=8, vocabulary=5), "tokenizer.json")


def test_padding_and_length_of_the_file_do_not_count() -> None:
    """Published files pad to 128: that would change every state."""
    tokenizer = Tokenizer.from_buffer(pieces_file())
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(64)
    read = read_tokenizer(tokenizer.to_str().encode(), TEXT, "tokenizer.json")
    assert len(read.encode("red cat").ids) == 4
    assert len(read.encode("red cat " * 30).ids) == TEXT.length


def test_sizes_that_are_no_encoder_are_refused() -> None:
    for wrong in ({"heads": 5, "dim": 384}, {"layers": 0}, {"length": 2}):
        with pytest.raises(ValueError, match=r"heads|at least"):
            MiniLMConfig(**wrong)  # type: ignore[arg-type]
    assert isinstance(MiniLM(TEXT), MiniLM)
