"""Low-rank linears of a model that one op computes together."""

from __future__ import annotations

from torch import nn

from grasp.model.families import family_of
from grasp.model.gated_mlp import fuse_gate_
from grasp.model.input_group import InputGroup
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.offload import is_fetched_per_call


def group_linears_(model: nn.Module, enabled: bool = True) -> list[tuple[str, ...]]:
    """Group low-rank linears that share an input, so that one op computes them; results and ``state_dict`` stay.

    Factors on a GPU, also ones that arrive there later, move to packed memory: the Vh of a group one behind the other,
    ranks padded with zeros to a multiple of 16. The parameters keep their shapes. A U of another rank has rows that are
    not adjacent. Fused optimizers, FSDP2 and ``safetensors.torch`` refuse such parameters. So ``train()`` makes a U
    that requires gradients contiguous, and ``eval()`` returns it to the same memory. A copy of a model is packed by the
    next call of this function, or of ``to()`` with another device or dtype.

    On a GPU without gradients, ``lowrank_glu`` computes gate, activation and up of an MLP in one op, if both linears
    are low-rank, nothing hooks into them, and the source of the MLP's forward is the formula of ``gated_mlp.py``.

    Args:
        model: any module; existing groups of its low-rank linears are discarded.
        enabled: ``False`` only discards the groups and fused MLPs, and makes all factors contiguous.

    Returns:
        The groups, as the paths of their members.

    Example:
        >>> names = ("gate_proj", "up_proj", "down_proj")
        >>> mlp = nn.ModuleDict({name: LowRankLinear(8, 8, 2) for name in names})
        >>> group_linears_(mlp)
        [('gate_proj', 'up_proj')]
    """
    groups: list[tuple[str, ...]] = []
    for path, parent in list(model.named_modules()):
        fuse_gate_(parent, enabled)
        children = {name: child for name, child in parent.named_children() if isinstance(child, LowRankLinear)}
        for child in children.values():
            if not enabled:
                child.group.unpack_()
            child.group = InputGroup([child], packs=enabled)
        for names in family_of(path).shared_inputs if enabled and children else ():
            members = {name: children[name] for name in names if name in children}
            if len(members) > 1 and not any(map(is_fetched_per_call, members.values())):
                group = InputGroup(list(members.values()), packs=True)
                for member in members.values():
                    member.group = group
                groups.append(tuple(f"{path}.{name}".lstrip(".") for name in members))
        for child in children.values():
            child.group.pack_()
    return groups
