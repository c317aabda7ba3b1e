"""Graphs on a CPU, as strict as a device's: a replay runs what was recorded on the recorded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Each makes the host wait for the device, or a shape follow from data.
SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item"}


class Tape(TorchDispatchMode):
    """Records operations with their very operands. Numbers of Python stay as they were, as in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in SYNCHRONISING, f"{func} cannot be recorded"
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        # The rest are views of operands, or operands that were written to.
        own = [(i, t) for i, t in enumerate(made) if t.untyped_storage().data_ptr() not in known]
        self._operations.append((func, args, kwargs, own))
        return out

    def replay(self) -> None:
        for func, args, kwargs, own in self._operations:
            found = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for i, target in own:
                target.copy_(found[i])


class _Broken(Exception):  # noqa: N818 - what a device says of an operation that it cannot record
    pass


class _Breaking(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._left = 3

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if not self._left:
            raise _Broken
        return func(*args, **(kwargs or {}))


class RecordedGraphs:
    """`dd_core.engine.graphs.Graphs` on a CPU.

    Args:
        loading: nothing can be recorded.
        failing: recording breaks off at its third operation.
    """

    def __init__(self, lanes: int = 2) -> None:
        self.lanes, self.loading, self.failing = lanes, False, False
        self.recorded = self.replayed = 0
        self._lane: int | None = None

    def record(self, function: Callable[[], None], lane: int) -> Callable[[], object] | None:
        assert self._lane == lane
        function()
        if self.loading:
            return None
        if self.failing:
            with suppress(_Broken), _Breaking():
                function()
            return None
        tape = Tape()
        with tape:
            function()
        self.recorded += 1

        def replay() -> None:
            assert self._lane == lane
            self.replayed += 1
            tape.replay()

        tape.replay()
        return replay

    @contextmanager
    def on(self, lane: int) -> Iterator[None]:
        assert self._lane is None
        self._lane = lane
        try:
            yield
        finally:
            self._lane = None

    def join(self) -> None:
        assert self._lane is None
