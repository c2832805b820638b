"""Triton's interpreter as the tests want it: each changes the process for good."""

from typing import Any

import torch


def poison() -> None:
    """Memory that a kernel does not write shows as NaN."""
    empty = torch.empty
    torch.empty = lambda *size, **kinds: empty(*size, **kinds).fill_(float("nan"))


def mend_bfloat16() -> None:
    """The interpreter multiplies the bits of bfloat16 as integers; compiled kernels do not."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def numbers(x: Any) -> Any:
        half = x.dtype.scalar == tl.bfloat16
        return (x.data.astype(np.uint32) << 16).view(np.float32) if half else x.data

    def create_dot(self: Any, a: Any, b: Any, c: Any, *rest: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return original(self, a, b, c, *rest)
        product = np.matmul(numbers(a), numbers(b), dtype=np.float32)
        return interpreter.TensorHandle(product + c.data, c.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def patch_once() -> None:
    """The interpreter exchanges the language for its own for each function that a kernel calls, again and
    again: a third of the time. Once for each module that has it will do until the kernel is done.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    original, done = interpreter._patch_lang, set[Any]()

    class Scope(interpreter._LangPatchScope):  # type: ignore[misc]
        def restore(self) -> None:
            super().restore()
            done.clear()

    def once(fn: Any) -> Any:
        names = {name for name in (tl, tl.core) if any(x is name for x in fn.__globals__.values())}
        if names <= done:
            return interpreter._LangPatchScope()
        done.update(names)
        scope = Scope()
        scope.__dict__ = original(fn).__dict__
        return scope

    interpreter._patch_lang = once
