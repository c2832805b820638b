"""What a predicate is made of: `triton.jit`, or where there is no Triton, as on macOS, a stand-in."""

from collections.abc import Callable
from typing import Any

try:
    from triton import jit
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise

    class jit:  # type: ignore[no-redef]
        """Holds the function as `fn`, which is all that the reference and the CPU ask of a predicate."""

        def __init__(self, fn: Callable[..., Any]) -> None:
            self.fn = fn


__all__ = ["jit"]
