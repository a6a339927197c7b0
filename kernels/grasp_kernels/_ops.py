"""The namespace of the registered ops; a build for the Kernel Hub gets one of its own, see packages/kernel-hub."""

from __future__ import annotations

import torch

ops = torch.ops.grasp


def add_op_namespace_prefix(op_name: str) -> str:
    """The qualified name of an op."""
    return f"grasp::{op_name}"
