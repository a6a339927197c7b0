"""The README.md of a checkpoint folder: where the model comes from, how to use it, what was compressed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from grasp.modules import LowRankLinear

if TYPE_CHECKING:  # transformers imports this module before it has defined its models
    from transformers import PreTrainedModel

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LAYER = re.compile(r"(?P<layer>.*?\.\d+)\.(?P<module>.+)")
_LICENSE_KEYS = ("license", "license_name", "license_link")
# The hub's client lets its HTTP library's errors through, and that library's name depends on the version.
_HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError)

_TEMPLATE = """\
---
{front_matter}
---

# {title}

{origin}, made smaller with [GRASP](https://arxiv.org/abs/2501.00339): {count} linear layers were replaced by low-rank \
ones, which takes {removed:.1%} of the parameters out of the model ({before:,} before, {after:,} now).

## Use

Install `grasp-llm` beside transformers; it needs no import.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the name of this repository on the Hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = model.generate(**tokenizer("The first thing", return_tensors="pt"), max_new_tokens=20)
print(tokenizer.decode(tokens[0]))
```

`model.dequantize()` turns it into a model of plain dense layers.

## What was compressed

Per linear layer the rank, and the largest one it could have; parameters as a share of the dense layers'.

| layer | rank of full rank | parameters kept |
| --- | --- | ---: |
{rows}
"""


def model_card(
    model: PreTrainedModel, *, base_model: str | None, license: Mapping[str, str] | None = None, details: str = ""
) -> str:
    """The text of a model card, front matter included.

    Args:
        model: compressed.
        base_model: what was compressed; named in the front matter only where it is a name on the hub (``owner/name``).
        license: front matter keys ``license``, ``license_name``, ``license_link``, as ``read_license`` finds them.
        details: Markdown to end the card with, such as how it was made and what it costs in perplexity.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    on_hub = base_model is not None and is_hub_name(base_model)
    front_matter: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["grasp", "low-rank"],
        **({"base_model": base_model, "base_model_relation": "quantized"} if on_hub else {}),
        **{key: value for key, value in (license or {}).items() if key in _LICENSE_KEYS},
    }
    after = sum(parameter.numel() for parameter in model.parameters())
    before = after + sum(_dense_parameters(layer) - _parameters(layer) for layer in layers.values())
    name = _display_name(base_model) or f"a {model.config.model_type} model"
    card = _TEMPLATE.format(
        front_matter=ModelCardData(**front_matter).to_yaml(),
        title=f"{name[0].upper()}{name[1:]}, compressed",
        origin=f"[{base_model}](https://huggingface.co/{base_model})" if on_hub else f"{name[0].upper()}{name[1:]}",
        count=len(layers),
        removed=1 - after / before,
        before=before,
        after=after,
        rows="\n".join(_rows(layers)),
    )
    return card + (f"\n{details.strip()}\n" if details else "")


def with_section(card: str, title: str, text: str) -> str:
    """A card that ends with a section, in the place of what it has of that title and after."""
    head = card.partition(f"\n## {title}\n")[0].rstrip()
    return f"{head}\n\n## {title}\n\n{text.strip()}\n"


def is_hub_name(name: str) -> bool:
    """Whether this can only be a repository on the Hugging Face hub: ``owner/name``, and no path that is here."""
    return bool(_HUB_NAME.fullmatch(name)) and not name.lower().endswith(".gguf") and not Path(name).exists()


def read_license(source: str) -> dict[str, str]:
    """The licence keys in the card of a folder or a hub repository; empty where it has none or is out of reach."""
    try:
        path = hf_hub_download(source, "README.md") if is_hub_name(source) else Path(source) / "README.md"
        data = ModelCard.load(path).data.to_dict()
    except _HUB_ERRORS:
        return {}
    return {key: str(data[key]) for key in _LICENSE_KEYS if data.get(key)}


def _display_name(base_model: str | None) -> str:
    """The last part of a hub name or path."""
    return Path(base_model).name.removesuffix(".gguf") if base_model else ""


def _rows(layers: Mapping[str, LowRankLinear]) -> list[str]:
    groups: dict[str, dict[str, LowRankLinear]] = defaultdict(dict)
    for path, layer in layers.items():
        match = _LAYER.fullmatch(path)
        groups[match["layer"] if match else "model"][match["module"] if match else path] = layer
    return [
        f"| `{place}` | "
        + ", ".join(f"`{name}` {m.rank} of {min(m.in_features, m.out_features)}" for name, m in group.items())
        + f" | {sum(map(_parameters, group.values())) / sum(map(_dense_parameters, group.values())):.1%} |"
        for place, group in groups.items()
    ]


def _parameters(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def _dense_parameters(layer: LowRankLinear) -> int:
    return layer.in_features * layer.out_features + (0 if layer.bias is None else layer.out_features)
