from __future__ import annotations

import importlib.util

import pytest

import grasp_kernels


@pytest.mark.parametrize("name", grasp_kernels.__all__)
def test_no_module_has_the_name_of_a_public_object(name: str) -> None:
    # The import of such a module, which the table does late, would replace the object.
    assert importlib.util.find_spec(f"grasp_kernels.{name}") is None
