"""A hash over weights: which ones something was made with."""

from __future__ import annotations

import hashlib

from torch import Tensor, nn


def weights_digest(*parts: nn.Module | Tensor) -> str:
    """SHA-256 over the tensors of all parts: which weights something was made with."""
    digest = hashlib.sha256()
    for part in parts:
        tensors = {"": part} if isinstance(part, Tensor) else part.state_dict()
        for key, value in sorted(tensors.items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
