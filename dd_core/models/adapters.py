"""Published checkpoints' keys → ours, strictly: every key is used, or ignored for a stated reason.

    state dict of the reference ─▶ rules (pattern → name) ─▶ our state dict, and what was ignored

Tensors are passed through or viewed, never copied, so a memory-mapped checkpoint stays on disk until
it is converted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dd_core.errors import WeightsError
from dd_core.layout import paper_student_mask, student_mask
from dd_core.models.config import VARConfig

# Made by the reference on construction, kept in its checkpoints, and computed by ours.
_DERIVED = "derived from the architecture"
_STATISTIC = "a training statistic"
_CACHE = "a cache that the reference leaves behind"
_COMPARED = "derived from the architecture, and compared with it"

Name = str | Callable[[re.Match[str], Tensor], Mapping[str, Tensor]]


@dataclass
class Adapted:
    """Our state dict, and the reference's keys that it does not need, with the reason."""

    state: dict[str, Tensor]
    ignored: dict[str, str] = field(default_factory=dict)


def adapt(
    state: Mapping[str, Tensor], rules: Mapping[str, Name], ignorable: Mapping[str, str], source: str
) -> Adapted:
    """Applies the first rule whose pattern matches a whole key.

    Args:
        rules: pattern → replacement (as `re.sub` knows it), or a function that makes tensors.
        ignorable: pattern → why the key is not needed.

    Raises:
        WeightsError: a key that no rule and no reason covers, or two keys with one name.
    """
    out = Adapted({})
    unknown = []
    for key, value in state.items():
        reason = next((why for p, why in ignorable.items() if re.fullmatch(p, key)), None)
        match = next(filter(None, (re.fullmatch(pattern, key) for pattern in rules)), None)
        if reason is not None:
            out.ignored[key] = reason
        elif match is None:
            unknown.append(key)
        else:
            name = rules[match.re.pattern]
            made = {match.expand(name): value} if isinstance(name, str) else name(match, value)
            for ours, tensor in made.items():
                if ours in out.state:
                    raise WeightsError(f"{source}: two tensors for {ours}, one of them {key}", param=key)
                out.state[ours] = tensor
    if unknown:
        raise WeightsError(
            f"{source}: unexpected {_first(unknown, ', ')}: not a checkpoint of this kind", param=unknown[0]
        )
    return out


def _first(items: list[str], separator: str) -> str:
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(items[:5]) + more


def load_strictly(module: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads our state dict by taking its tensors over, not copying them (so `module` may be on meta).

    Raises:
        WeightsError: as `check_state`.
    """
    check_state(module, state, source)
    module.load_state_dict(state, assign=True)


def check_state(module: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Checks that a state dict is a module's, by names, shapes and kinds of number.

    Raises:
        WeightsError: what is missing, unexpected, of another shape or no number of the right kind;
            the first five.
    """
    expected = module.state_dict()
    problems = [f"missing {k}" for k in expected if k not in state]
    problems += [f"unexpected {k}" for k in state if k not in expected]
    both = [(k, state[k], expected[k]) for k in expected if k in state]
    problems += [
        f"{k} has shape {list(t.shape)}, needs {list(e.shape)}" for k, t, e in both if t.shape != e.shape
    ]
    problems += [
        f"{k} has type {t.dtype}, needs {e.dtype} or alike"
        for k, t, e in both
        if t.is_floating_point() != e.is_floating_point()
    ]
    if problems:
        raise WeightsError(f"{source}: {_first(problems, '; ')}", param=Path(source).name)


def adapt_llamagen_vq(state: Mapping[str, Tensor], source: str = "LlamaGen VQ") -> Adapted:
    """`vq_ds16_c2i.pt` and its kin (`['model']`)."""
    rules: dict[str, Name] = {
        r"quantize\.embedding\.weight": "codebook_raw",
        r"((encoder|decoder|quant_conv|post_quant_conv)\..*)": r"\1",
    }
    return adapt(state, rules, {r"quantize\.codebook_used": _STATISTIC}, source)


def adapt_llamagen_gpt(state: Mapping[str, Tensor], source: str = "LlamaGen GPT") -> Adapted:
    """`c2i_*.pt`, `t2i_*.pt`, and the students `llamagen-{B,L}.pt`."""
    rules: dict[str, Name] = {
        r"((layers|tok_embeddings|norm|output|cls_embedding|n_d_embed|final_layer_conti)\..*)": r"\1"
    }
    ignorable = {r"layers\.\d+\.attention\.kv_cache\..*": _CACHE, r"freqs_cis|causal_mask": _DERIVED}
    return adapt(state, rules, ignorable, source)


def _split_qkv(match: re.Match[str], value: Tensor) -> Mapping[str, Tensor]:
    """One 1×1 convolution for q, k and v → three."""
    place, kind = match[1], match[2]
    return {f"{place}.{n}.{kind}": t for n, t in zip("qkv", value.chunk(3), strict=True)}


def _execution_order(key: str, levels: int) -> str:
    key = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.conv_blocks.\1.", key)
    up = re.match(r"^decoder\.up\.(\d+)\.", key)
    if up is not None:
        key = f"decoder.conv_blocks.{levels - 1 - int(up[1])}." + key[up.end() :]
    key = re.sub(r"^((?:en|de)coder\.conv_blocks\.\d+)\.block\.", r"\1.res.", key)
    for k, name in enumerate(("block_1", "attn_1", "block_2")):
        key = re.sub(rf"^((?:en|de)coder)\.mid\.{name}\.", rf"\1.mid.{k}.", key)
    return key


def adapt_var_vqvae(state: Mapping[str, Tensor], levels: int, source: str = "VAR VQVAE") -> Adapted:
    """`vae_ch160v4096z32.pth`.

    Args:
        levels: resolutions of encoder and decoder; the reference counts the decoder's from the
            highest one, ours are in order of execution.
    """
    flat = {_execution_order(key, levels): value for key, value in state.items()}
    rules: dict[str, Name] = {
        r"quantize\.embedding\.weight": "codebook_raw",
        r"quantize\.quant_resi\.qresi_ls\.(\d+)\.(weight|bias)": r"phi.\1.\2",
        r"(.*)\.qkv\.(weight|bias)": _split_qkv,
        r"((encoder|decoder|quant_conv|post_quant_conv)\..*)": r"\1",
    }
    return adapt(flat, rules, {r"quantize\.ema_vocab_hit_SV": _STATISTIC}, source)


_VAR_RULES: dict[str, Name] = {
    r"((blocks|word_embed|class_emb|lvl_embed|shared_ada_lin|head_nm|head)\..*)": r"\1",
    r"(pos_start|pos_1LC)": r"\1",
}
_VAR_DERIVED = {
    r"lvl_1L": _DERIVED,
    r"attn_bias_for_masking": _DERIVED,
    r"blocks\.\d+\.attn\.zero_k_bias": _DERIVED,
}


def adapt_var(state: Mapping[str, Tensor], source: str = "VAR") -> Adapted:
    """`var_d{16,20,24,30,36}.pth`."""
    return adapt(state, _VAR_RULES, _VAR_DERIVED, source)


def adapt_var_dd(state: Mapping[str, Tensor], source: str = "VAR-DD") -> Adapted:
    """`var-d{16,20,24}.pth` (`['trainer']['ema_parameters']`). See `student_mask_of` for the mask."""
    rules = {**_VAR_RULES, r"((n_d_embed|layerwise_n_d_embed|final_layer_conti)\..*)": r"\1"}
    return adapt(state, rules, {**_VAR_DERIVED, r"attn_bias_for_masking": _COMPARED}, source)


def student_mask_of(state: Mapping[str, Tensor], cfg: VARConfig) -> tuple[str, Tensor | None]:
    """The mask that a VAR-DD checkpoint was trained with: (`VARConfig.student_mask`, the mask or None).

    The reference keeps its mask in the checkpoint, and would run with it. A mask that is neither
    the released formula nor the paper's comes back as a tensor, `[1 + L, 1 + L]` bool.

    Raises:
        WeightsError: a mask of another size.
    """
    bias = state.get("attn_bias_for_masking")
    if bias is None:
        return "released", None
    size = 1 + cfg.layout.num_tokens
    if bias.numel() != size * size:
        raise WeightsError(
            f"attn_bias_for_masking has shape {list(bias.shape)}, needs [1, 1, {size}, {size}]",
            param="attn_bias_for_masking",
        )
    mask = bias.reshape(size, size) == 0
    if torch.equal(mask, student_mask(cfg.layout)):
        return "released", None
    if torch.equal(mask, paper_student_mask(cfg.layout)):
        return "paper", None
    return "checkpoint", mask
