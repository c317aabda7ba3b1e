"""Our weights under the published checkpoints' names: the inverse of `dd_core.models.adapters`.

For tiny stand-ins of published files. Written from the documented key lists, not from the adapters,
so that a wrong rule there does not cancel out here.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from dd_core.models.multiscale_vq import MultiScaleVQ
from dd_core.models.var import VARStudent, VARTeacher
from dd_core.models.vq import VQTokenizer


def reference_state(module: nn.Module) -> dict[str, Tensor]:
    """A plain state dict as the reference would save it, with the buffers that it keeps."""
    state = {k: v.detach().clone() for k, v in module.state_dict().items()}
    if isinstance(module, VQTokenizer):
        state["quantize.embedding.weight"] = state.pop("codebook_raw")
        state["quantize.codebook_used"] = torch.zeros(65536)
    elif isinstance(module, MultiScaleVQ):
        state = _vqvae(module, state)
    elif isinstance(module, VARTeacher | VARStudent):
        state |= _var_buffers(module)
    return state


def nested(kind: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """The state dict inside what the published file of its kind holds."""
    match kind:
        case "llamagen-vq" | "llamagen-gpt":
            return {"model": state}
        case "llamagen-dd":
            return {"model": {k: v + 1 for k, v in state.items()}, "ema": state, "steps": 1}
        case "var-dd":
            other = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
            return {"epoch": 1, "trainer": {"ema_parameters": state, "var_wo_ddp": other}}
        case "plain":
            return state
        case _:
            raise ValueError(kind)


def _vqvae(module: MultiScaleVQ, state: dict[str, Tensor]) -> dict[str, Tensor]:
    cfg, out = module.cfg, {}
    top = len(cfg.channel_multipliers) - 1
    for key, value in state.items():
        name = key
        name = re.sub(r"^encoder\.conv_blocks\.(\d+)\.res\.", r"encoder.down.\1.block.", name)
        name = re.sub(r"^encoder\.conv_blocks\.", "encoder.down.", name)
        level = re.match(r"^decoder\.conv_blocks\.(\d+)\.(.*)", name)
        if level is not None:
            name = f"decoder.up.{top - int(level[1])}." + level[2].replace("res.", "block.", 1)
        for k, part in enumerate(("block_1", "attn_1", "block_2")):
            name = re.sub(rf"^((?:en|de)coder)\.mid\.{k}\.", rf"\1.mid.{part}.", name)
        name = re.sub(r"^phi\.", "quantize.quant_resi.qresi_ls.", name)
        out[name.replace("codebook_raw", "quantize.embedding.weight")] = value
    for key in [k for k in out if re.search(r"\.q\.(weight|bias)$", k)]:
        stem, kind = (
            key[: -len(".q.weight")] if key.endswith("weight") else key[: -len(".q.bias")],
            key.rsplit(".", 1)[1],
        )
        out[f"{stem}.qkv.{kind}"] = torch.cat([out.pop(f"{stem}.{n}.{kind}") for n in "qkv"])
    out["quantize.ema_vocab_hit_SV"] = torch.zeros(len(cfg.sides), cfg.codebook_size)
    return out


def _var_buffers(module: VARTeacher | VARStudent) -> dict[str, Tensor]:
    """Level numbers, the mask as a bias of 0 and −∞, and zero key biases."""
    level = module.level_L if isinstance(module, VARTeacher) else module.level_S
    size = len(level)
    bias = torch.zeros(size, size).masked_fill(~module.mask_SS, float("-inf"))
    buffers = {"lvl_1L": level[None], "attn_bias_for_masking": bias[None, None]}
    for i in range(module.cfg.depth):
        buffers[f"blocks.{i}.attn.zero_k_bias"] = torch.zeros(module.cfg.dim)
    return buffers
