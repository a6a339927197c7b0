"""Values that are computed once for a tensor and kept until the tensor is changed in place or freed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Value = TypeVar("Value")


class PerVersion(Generic[Value]):
    """``compute`` as a function that runs once per tensor object and version; see ``Tensor._version``.

    A view is another tensor object than its base. Changes that PyTorch does not count, such as those through ``.data``,
    are not seen. A tensor made under ``torch.inference_mode`` counts no changes, so its value is computed every time.
    """

    def __init__(self, compute: Callable[[Tensor], Value]) -> None:
        self._compute = compute
        self._values = WeakTensorKeyDictionary()

    def __call__(self, tensor: Tensor) -> Value:
        """The value of a tensor."""
        if tensor.is_inference():
            return self._compute(tensor)
        version, value = self._values.get(tensor, (None, None))
        if version != tensor._version:
            version, value = tensor._version, self._compute(tensor)
            self._values[tensor] = version, value
        return value
