"""The device that a model runs on, and its arithmetic.

Serving is float32 unless another arithmetic is chosen (`dd_core.engine.arithmetic`). Training uses
bfloat16 products through autocast where the device multiplies bfloat16 in hardware; parameters
stay float32.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

from dd_core.errors import InvalidRequestError

_CPU_INFO = Path("/proc/cpuinfo")


def pick_device(name: str = "auto") -> torch.device:
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        InvalidRequestError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind == "cuda" and (number or "0").isdigit():
        if int(number or 0) < torch.cuda.device_count():
            return torch.device(name)
        raise InvalidRequestError(
            f"device {name!r} is not on this machine ({torch.cuda.device_count()} CUDA devices)",
            param="device",
        )
    raise InvalidRequestError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}", param="device")


def native_bfloat16(device: torch.device) -> bool:
    """True if `device` multiplies bfloat16 in hardware. A CPU that does not emulates it, 15 times slower."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def native_float16(device: torch.device) -> bool:
    """True if `device` multiplies float16 in hardware."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 autocast for training on `device`; a no-op where that would be emulated."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=native_bfloat16(device))


def cpu_name(info: Path = _CPU_INFO) -> str:
    """Name the kind of CPU, as Linux does; elsewhere as far as Python knows it."""
    try:
        text = info.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    first = text.partition("\n\n")[0]
    found = re.findall(r"^(?:model name|CPU (?:implementer|variant|part))\s*: *(.+)$", first, re.MULTILINE)
    return " ".join(found) or platform.processor() or platform.machine()
