"""Published keys → ours: nothing is guessed, nothing is dropped without a reason, and errors name the key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dd_core.errors import WeightsError
from dd_core.layout import paper_student_mask, student_mask
from dd_core.models import adapters
from dd_core.models.adapters import adapt, load_strictly, student_mask_of
from dd_core.models.config import LlamaGenConfig, VQConfig
from dd_core.models.llamagen import LlamaGenStudent, LlamaGenTeacher
from dd_core.models.multiscale_vq import MultiScaleVQ
from dd_core.models.var import VARStudent, VARTeacher
from dd_core.models.vq import VQTokenizer
from tests.tiny_var import VAR, VQ
from tests.upstream import reference_state

GPT = LlamaGenConfig(2, 2, 16, 16, 4, 3, 7, hidden_multiple=8)
TEXT = replace(GPT, text_tokens=4, text_dim=6)
_TOKENIZER = MultiScaleVQ(VQ)

# Module, adapter, and the keys of the published file that are not needed.
KINDS: dict[
    str, tuple[Callable[[], nn.Module], Callable[[dict[str, Tensor]], adapters.Adapted], set[str]]
] = {
    "llamagen-vq": (
        lambda: VQTokenizer(VQConfig(16, 4, 32, 32, (1, 1), 1)),
        adapters.adapt_llamagen_vq,
        {"quantize.codebook_used"},
    ),
    "llamagen-c2i": (lambda: LlamaGenTeacher(GPT), adapters.adapt_llamagen_gpt, set()),
    "llamagen-t2i": (lambda: LlamaGenTeacher(TEXT), adapters.adapt_llamagen_gpt, set()),
    "llamagen-dd": (lambda: LlamaGenStudent(GPT), adapters.adapt_llamagen_gpt, set()),
    "var-vqvae": (
        lambda: MultiScaleVQ(VQ),
        lambda state: adapters.adapt_var_vqvae(state, 2),
        {"quantize.ema_vocab_hit_SV"},
    ),
    "var": (
        lambda: VARTeacher(VAR, _TOKENIZER.next_inputs),
        adapters.adapt_var,
        {"lvl_1L", "attn_bias_for_masking", "blocks.0.attn.zero_k_bias", "blocks.1.attn.zero_k_bias"},
    ),
    "var-shared": (
        lambda: VARTeacher(replace(VAR, shared_adaln=True), _TOKENIZER.next_inputs),
        adapters.adapt_var,
        {"lvl_1L", "attn_bias_for_masking", "blocks.0.attn.zero_k_bias", "blocks.1.attn.zero_k_bias"},
    ),
    "var-dd": (
        lambda: VARStudent(VAR),
        adapters.adapt_var_dd,
        {"lvl_1L", "attn_bias_for_masking", "blocks.0.attn.zero_k_bias", "blocks.1.attn.zero_k_bias"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_published_key_is_used_or_ignored_for_a_reason(kind: str) -> None:
    build, adapter, not_needed = KINDS[kind]
    model, fresh = build(), build()
    adapted = adapter(reference_state(model))
    assert set(adapted.ignored) == not_needed and all(adapted.ignored.values())
    load_strictly(fresh, adapted.state, kind)
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_key_is_refused_by_name(kind: str) -> None:
    build, adapter, _ = KINDS[kind]
    state = reference_state(build()) | {"optimizer.step": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"unexpected optimizer\.step") as caught:
        adapter(state)
    assert caught.value.param == "optimizer.step"


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_key_is_refused(kind: str) -> None:
    """Every tensor is needed: the published loaders are not strict, and would leave it as it was made."""
    build, adapter, not_needed = KINDS[kind]
    state = reference_state(build())
    for key in [key for key in state if key not in not_needed][::7]:
        short = {k: v for k, v in state.items() if k != key}
        with pytest.raises(WeightsError, match="missing"):
            load_strictly(build(), adapter(short).state, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_surplus_key_of_a_known_module_is_refused_by_name(kind: str) -> None:
    """By the adapter, or, where its rule takes the whole module, by the strict load."""
    build, adapter, not_needed = KINDS[kind]
    state = reference_state(build())
    odd = [key for key in state if key not in not_needed][3] + "_old"
    with pytest.raises(WeightsError, match=r"unexpected .*_old"):
        load_strictly(build(), adapter(state | {odd: torch.zeros(1)}).state, kind)


def test_only_the_first_five_unknown_keys_are_named() -> None:
    with pytest.raises(WeightsError, match=r"unexpected k0, k1, k2, k3, k4 and 2 more"):
        adapt({f"k{i}": torch.zeros(1) for i in range(7)}, {}, {}, "file")


def test_two_tensors_of_one_name_are_refused() -> None:
    state = {"a.weight": torch.zeros(1), "b.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"two tensors for weight, one of them b\.weight") as caught:
        adapt(state, {r"[ab]\.(weight)": r"\1"}, {}, "file")
    assert caught.value.param == "b.weight"


def test_patterns_must_match_whole_keys() -> None:
    with pytest.raises(WeightsError, match="unexpected weights"):
        adapt({"weights": torch.zeros(1)}, {"weight": "weight"}, {"s": "a reason"}, "file")


def test_missing_unexpected_and_misshapen_tensors_are_named_together() -> None:
    module = nn.Linear(3, 2)
    state = {"weight": torch.zeros(3, 2), "gain": torch.zeros(1)}
    with pytest.raises(WeightsError) as caught:
        load_strictly(module, state, "folder/file.pt")
    for part in ("missing bias", "unexpected gain", "weight has shape [3, 2], needs [2, 3]"):
        assert part in caught.value.message
    assert caught.value.param == "file.pt"
    with pytest.raises(WeightsError, match=r"weight has type torch\.int64"):
        load_strictly(module, {"weight": torch.zeros(2, 3).long(), "bias": torch.zeros(2)}, "file")
    many = nn.ModuleList(nn.Linear(1, 1) for _ in range(4))
    with pytest.raises(WeightsError, match="and 3 more"):
        load_strictly(many, {}, "file")


def test_weights_are_taken_over_and_not_copied() -> None:
    """A checkpoint that is mapped from disk stays there; a module on meta gets real memory."""
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    state = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    load_strictly(module, state, "file")
    assert module.weight.data_ptr() == state["weight"].data_ptr()


def test_a_reference_run_leaves_caches_that_are_ignored() -> None:
    state = reference_state(LlamaGenTeacher(GPT))
    state |= {"layers.0.attention.kv_cache.k_cache": torch.zeros(1), "freqs_cis": torch.zeros(1)}
    ignored = adapters.adapt_llamagen_gpt(state).ignored
    assert set(ignored) == {"layers.0.attention.kv_cache.k_cache", "freqs_cis"}


def test_a_vqvae_of_another_depth_is_refused() -> None:
    """The decoder's levels are counted from the other end: a wrong depth must not shift them silently."""
    state = reference_state(MultiScaleVQ(VQ))
    with pytest.raises(WeightsError):
        load_strictly(MultiScaleVQ(VQ), adapters.adapt_var_vqvae(state, 3).state, "file")


def _bias(mask: Tensor) -> dict[str, Tensor]:
    return {"attn_bias_for_masking": torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[None, None]}


def test_a_checkpoints_mask_says_which_it_is() -> None:
    released, paper = student_mask(VAR.layout), paper_student_mask(VAR.layout)
    assert student_mask_of({}, VAR) == ("released", None)
    assert student_mask_of(_bias(released), VAR) == ("released", None)
    assert student_mask_of(_bias(paper), VAR) == ("paper", None)
    own = released.clone()
    own[3, 2] = not own[3, 2]
    kind, mask = student_mask_of(_bias(own), VAR)
    assert kind == "checkpoint" and mask is not None and torch.equal(mask, own)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"needs \[1, 1, 31, 31\]") as caught:
        student_mask_of(_bias(torch.ones(30, 30, dtype=torch.bool)), VAR)
    assert caught.value.param == "attn_bias_for_masking"
