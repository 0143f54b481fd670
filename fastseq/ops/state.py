"""States between calls."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

State = TypeVar("State")


def detach_state(state: State) -> State:
    """The same state, cut off from the graph that made it: what truncated backpropagation through time carries on.

    Args:
        state: a tensor, a tuple or list of states as a layer returns them, or None.

    Returns:
        The same with every tensor detached (it shares memory with the one given).

    Raises:
        TypeError: something else.
    """
    detached: Any = None
    if isinstance(state, Tensor):
        detached = state.detach()
    elif isinstance(state, (tuple, list)):
        values = [detach_state(each) for each in state]
        make: Any = type(state)
        detached = make(*values) if hasattr(state, "_fields") else make(values)  # a named tuple takes them one by one
    elif state is not None:
        raise TypeError(f"state: expected a Tensor, a tuple or list of them, or None, got {type(state).__name__}")
    return detached  # type: ignore[no-any-return]
