"""A model whose low-rank linears are pairs of ``nn.Linear``, with its own Python file instead of grasp."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.files import require_space
from grasp.model.grouping import group_linears_
from grasp.model.hf_quantizer import mark_compressed, require_floating
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.narrowing import mark_narrowed, narrowed_mlps, narrowed_shapes
from grasp.version import __version__

_FILE = "modeling_linear_pairs"
_MODULE = '''\
"""{model} with pairs of linears in place of some linears. Written by grasp {version}."""

from torch import nn
from transformers import {config}, {model}


class LinearPairsConfig({config}):
    """``linear_pairs`` maps the path of each pair to its inputs, rank and outputs.

    ``linear_shapes`` maps the paths of other linears with fewer of them to inputs and outputs.
    """

    model_type = "linear_pairs_{model_type}"


class LinearPairsForCausalLM({model}):
    """{model}, whose linears named in ``config.linear_pairs`` are ``nn.Sequential(nn.Linear, nn.Linear)``."""

    config_class = LinearPairsConfig

    def __init__(self, config):
        super().__init__(config)
        for path, (inputs, outputs) in config.linear_shapes.items():
            bias = self.get_submodule(path).bias is not None
            self.set_submodule(path, nn.Linear(inputs, outputs, bias=bias))
        for path, (inputs, rank, outputs) in config.linear_pairs.items():
            bias = self.get_submodule(path).bias is not None
            pair = nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))
            self.set_submodule(path, pair)
'''
_CARD = f"""\
---
library_name: transformers
tags: [custom_code]
---
# A low-rank model as pairs of linear layers

This folder needs transformers and not grasp. Read `{_FILE}.py`, then load it:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
```
"""


def export_linear_pairs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Write a checkpoint that ``from_pretrained(folder, trust_remote_code=True)`` loads without grasp.

    Its ``model_type`` is not that of the stock model, as which transformers would load it with random pairs.

    Args:
        model: changed in place by ``pair_linears_``.
        tokenizer: saved beside it.
        folder: an empty one.

    Returns:
        What became of the low-rank linears.

    Raises:
        UnsupportedModelError: as ``pair_linears_``.
        CheckpointError: as ``require_space``.
    """
    narrowed = narrowed_shapes(model)
    shapes = pair_linears_(model)
    require_space(folder, model.get_memory_footprint())
    model.save_pretrained(folder, save_original_format=False)  # other names need a table of the stock model_type
    tokenizer.save_pretrained(folder)
    if not shapes and not narrowed:
        return "No linear is low-rank: this is a stock checkpoint, without code."
    stock = {"model": type(model).__name__, "config": type(model.config).__name__}
    text = _MODULE.format(**stock, model_type=model.config.model_type, version=__version__)
    (folder / f"{_FILE}.py").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(_CARD, encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {
        "model_type": f"linear_pairs_{model.config.model_type}",
        "architectures": ["LinearPairsForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{_FILE}.LinearPairsConfig",
            "AutoModelForCausalLM": f"{_FILE}.LinearPairsForCausalLM",
        },
        "linear_pairs": shapes,
        "linear_shapes": {path: (k, n) for path, (n, k) in narrowed.items() if path not in shapes},
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return f"{len(shapes)} low-rank linears are pairs of nn.Linear. Load with trust_remote_code=True, without grasp."


def pair_linears_(model: PreTrainedModel) -> dict[str, tuple[int, int, int]]:
    """Replace each low-rank linear by ``nn.Sequential(nn.Linear(K, R, bias=False), nn.Linear(R, N))``, in place.

    Pivoted factors become U and Vh first. Nothing marks the model as compressed then.

    Returns:
        The path of each pair → K, R, N.

    Raises:
        UnsupportedModelError: if modules are quantised.
    """
    mark_compressed(model)
    require_floating(model.config)
    group_linears_(model, enabled=False)  # the MLPs get their own classes again
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)]
    for name, layer in layers:
        model.set_submodule(name, linear_pair(layer))
    for _, mlp in narrowed_mlps(model):
        mark_narrowed(mlp, False)
    mark_compressed(model)
    return {name: (layer.in_features, layer.rank, layer.out_features) for name, layer in layers}


def linear_pair(layer: LowRankLinear) -> nn.Sequential:
    """A low-rank linear as two linears with its tensors; a pivoted one is changed to plain factors."""
    layer.factor_()
    return nn.Sequential(_linear(layer.Vh, None), _linear(layer.U, layer.bias))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear
