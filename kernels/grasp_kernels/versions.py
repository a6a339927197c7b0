"""Values that are computed once for a tensor and kept until the tensor is changed in place or freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class PerVersion(Generic[Value]):
    """``compute`` as a function that runs once per tensor object and version; see ``Tensor._version``.

    A view is another tensor object than its base. Changes that PyTorch does not count, such as those through ``.data``,
    are not seen. A tensor made under ``torch.inference_mode`` counts no changes, so its value is computed every time.

    Args:
        compute: the function.
        uncounted: run it once for a tensor of inference mode too, and do not see its changes.
    """

    def __init__(self, compute: Callable[[Tensor], Value], *, uncounted: bool = False) -> None:
        self._compute, self._uncounted = compute, uncounted
        # By the address of the tensor object. A WeakTensorKeyDictionary takes 2 µs longer, in every call of an op.
        self._values: dict[int, tuple[weakref.ref[Tensor], int, Value]] = {}

    def __call__(self, tensor: Tensor) -> Value:
        """The value of a tensor."""
        if not tensor.is_inference():
            version = tensor._version
        elif self._uncounted:
            version = -1
        else:
            return self._compute(tensor)
        address, values = id(tensor), self._values
        if (entry := values.get(address)) is not None and entry[0]() is tensor and entry[1] == version:
            return entry[2]
        value = self._compute(tensor)
        values[address] = weakref.ref(tensor, lambda _: values.pop(address, None)), version, value
        return value
