"""Hooks on modules, other forward functions and other modules, that end with a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def hooked(
    *modules: nn.Module, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Call functions with every call of any of the modules, until the block ends.

    Args:
        modules: the modules that get the hooks.
        before: called as ``before(module, args, kwargs)``; it may return other ``(args, kwargs)``.
        after: called as ``after(module, args, kwargs, output)``; it may return another output.
    """
    with ExitStack() as stack:
        for module in modules:
            if before is not None:
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            if after is not None:
                stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield


@contextmanager
def forwarding(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Let modules run ``forward`` in place of their own forward function, until the block ends."""
    saved = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = forward
        yield
    finally:
        for module, original in zip(modules, saved, strict=True):
            if original is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = original


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules into the model, by their paths, until the block ends."""
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(model.set_submodule, name, model.get_submodule(name))
            model.set_submodule(name, module)
        yield
