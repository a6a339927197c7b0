"""Writes and reads the README.md of a checkpoint folder: its origin, its use, its low-rank layers, its results."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from yaml import YAMLError

from grasp.builtin import BUILTIN_LICENSE, BUILTIN_NAME
from grasp.calibration import NAMED_TEXTS
from grasp.checkpoint.inspection import Inspection, LowRankModule
from grasp.errors import CheckpointError, GraspError
from grasp.formatting import counts, one_line, printable, score_rows
from grasp.hub import BAD_ANSWERS, HUB_ERRORS
from grasp.model.lowrank_linear import Pivotable
from grasp.model.quantized_linear import QUANTIZED
from grasp.model.size import parameter_count
from grasp.reading import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LAYER = re.compile(r"(?P<layer>.*?\.\d+)\.(?P<module>.+)")
_EVALUATION = "Evaluation by grasp"
_EVALUATION_HEAD = "| model | on | metric | value |\n| --- | --- | --- | ---: |"
# The parts of ``_TEMPLATE`` that differ by sizes.
_SIZES = (
    re.compile(r"(?<=^tags:\n)- grasp\n(?:- low-rank\n)?(?:- quantized\n)?", re.MULTILINE),
    re.compile(r"\b\d+ linear layers were replaced by .{,200}? now\)\."),
    re.compile(r"^## What was compressed\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL),
)
FIGURE = "parameters-kept.png"  # beside the card
_FIGURE = re.compile(rf"^!\[[^\n]*\]\({re.escape(FIGURE)}\)\n\n[^\n]*\n\n", re.MULTILINE)  # and its caption
_LICENSE_KEYS = ("license", "license_name", "license_link")

_TEMPLATE = """\
---
{front_matter}
---

# {title}

{origin}, compressed with [GRASP](https://arxiv.org/abs/2501.00339): {count} linear layers were replaced by low-rank \
layers. In all, {removed:.1%} of the model's parameters were removed ({before:,} before, {after:,} now).

## Use

Install `grasp-llm` beside transformers, which refuses this folder without it. It needs no import. \
`grasp convert . -o pairs --to linear-pairs` writes a folder that needs transformers only.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the name of this repository on the Hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = model.generate(**tokenizer("The first thing", return_tensors="pt"), max_new_tokens=20)
print(tokenizer.decode(tokens[0]))
```

`model.dequantize()` converts the low-rank layers into dense ones. Where vLLM is installed too and has this \
architecture, `vllm serve .` serves the folder.

## What was compressed

Each linear layer with its rank and its full rank; parameters relative to the dense layers. Form of the low-rank \
layers: {forms}.{quantized}

| layer | rank of full rank | parameters |
| --- | --- | ---: |
{rows}
"""


_QUANTIZED = """

Quantised linear layers and embeddings, by how their values are stored: {}. `int4/64` has one scale per 64 columns, \
without a number there is one per row."""


class _CardLayer(NamedTuple):
    """A low-rank layer in the table of a card, beside ``LowRankModule``; parameters include the bias."""

    rank: int
    in_features: int
    out_features: int
    parameters: int
    dense_parameters: int
    form: str = "factored"


def model_card(
    model: PreTrainedModel,
    *,
    base_model: str | None,
    before: int | None = None,
    license: Mapping[str, str] | None = None,
    details: str = "",
) -> str:
    """Return the text of a model card, front matter included.

    Args:
        model: compressed.
        base_model: the model before compression; the front matter names it only if it is on the hub (``owner/name``).
        before: its parameters; ``None`` if no layers were removed.
        license: front matter keys ``license``, ``license_name``, ``license_link``, as ``read_license`` returns them.
        details: Markdown at the end of the card.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=1))
        >>> print(model_card(model, base_model="openai-community/gpt2").splitlines()[1])
        base_model: openai-community/gpt2
    """
    layers = {name: _layer(module) for name, module in model.named_modules() if isinstance(module, Pivotable)}
    storages = [str(module.storage) for module in model.modules() if isinstance(module, QUANTIZED)]
    sizes = parameter_count(model), before
    return _render(model.config.model_type, layers, storages, sizes, base_model, license or {}, details)


def folder_card(checkpoint: Inspection, *, base_model: str | None, license: Mapping[str, str] | None = None) -> str:
    """Return the card of a checkpoint folder. Arguments: see ``model_card``."""
    layers = {module.name: module for module in checkpoint.modules}
    storages = list(checkpoint.quantized.values())
    sizes = checkpoint.parameters, checkpoint.parameters_before
    return _render(checkpoint.model_type, layers, storages, sizes, base_model, license or {}, "")


def _render(
    model_type: str,
    layers: Mapping[str, _CardLayer | LowRankModule],
    storages: Sequence[str],
    sizes: tuple[int, int | None],
    base_model: str | None,
    license: Mapping[str, str],
    details: str,
) -> str:
    """The card; ``sizes`` are the parameters now, and before if that is known."""
    on_hub = base_model is not None and is_hub_name(base_model)
    front_matter: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["grasp", *(["low-rank"] if layers or not storages else []), *(["quantized"] if storages else [])],
        **({"base_model": base_model, "base_model_relation": "quantized"} if on_hub else {}),
        **{key: value for key, value in license.items() if key in _LICENSE_KEYS},
    }
    parameters, before = sizes
    before = before or parameters + sum(layer.dense_parameters - layer.parameters for layer in layers.values())
    name = Path(base_model or "").name.removesuffix(".gguf") or f"a {model_type} model"
    title = _literal(f"{name[0].upper()}{name[1:]}")
    card = _TEMPLATE.format(
        front_matter=ModelCardData(**front_matter).to_yaml(),
        title=f"{title}, compressed",
        origin=f"[{base_model}](https://huggingface.co/{base_model})" if on_hub else title,
        count=len(layers),
        removed=1 - parameters / before,
        before=before,
        after=parameters,
        forms=counts(layer.form for layer in layers.values()) or "none",
        quantized=_QUANTIZED.format(counts(storages)) if storages else "",
        rows="\n".join(_rows(layers)),
    )
    return card + (f"\n{details.strip()}\n" if details else "")


def with_results(
    card: str,
    documents: Sequence[Mapping[str, Any]] = (),
    *,
    parameters: int = 0,
    before: int = 0,
    is_quantized: bool = False,
) -> str:
    """Return a card with results of ``grasp evaluate``, as a table and as the hub's ``model-index``.

    They replace earlier results.

    Args:
        card: text with front matter.
        documents: output of ``grasp evaluate --json``; without any, earlier results are removed.
        parameters: parameters of the card's model.
        before: parameters of the model before compression. Results of models of other sizes are ignored.
        is_quantized: whether the card's model is; a number of it takes less than two bytes.

    Raises:
        CheckpointError: if the front matter cannot be read.
    """
    read = read_card(card)
    compressed, dense = (
        sorted({score for document in documents if _size(document) == wanted for score in _scores(document)})
        for wanted in ((parameters, is_quantized), (before, False))
    )
    data = cast(ModelCardData, read.data)
    data.model_name = _title(read.text) if compressed else None
    data.eval_results = [_eval_result(score) for score in compressed] or None
    parts = [f"---\n{data.to_yaml()}\n---", _section(_EVALUATION).sub("", read.text).strip()]
    if compressed or dense:
        rows = [
            f"| {label} | {score.on} | {_literal(score.metric)} | {score.text} |"
            for label, scores in (("before compression", dense), ("this model", compressed))
            for score in scores
        ]
        parts += [f"## {_EVALUATION}", "\n".join([_EVALUATION_HEAD, *rows])]
    return "\n\n".join(parts) + "\n"


def with_sizes(card: str, model: PreTrainedModel, before: int | None) -> str:
    """Return a card with the sizes and the table of a model in place of its own; all other text stays.

    ``before`` is as in ``model_card``.

    A card that ``model_card`` did not write may have neither; it is then returned as it is.
    """
    fresh = model_card(model, base_model=None, before=before)
    tags, sentence, table = (part.findall(fresh)[0].replace("\\", r"\\") for part in _SIZES)
    card = _SIZES[1].sub(sentence, _SIZES[0].sub(tags, card))
    return _SIZES[2].sub(f"{table}\n", card).rstrip() + "\n"


def without_results(card: str) -> str:
    """Return a card without results. A card that has none is returned as it is, even if it cannot be read."""
    return with_results(card) if f"\n## {_EVALUATION}\n" in card else card


def read_card(card: str) -> ModelCard:
    """Parse a card and its front matter with the hub's client.

    Raises:
        CheckpointError: if the front matter is missing or cannot be read.
    """
    try:
        read = ModelCard(card)
        _ = read.data.to_yaml()
    except (ValueError, TypeError, YAMLError, RecursionError) as error:
        raise CheckpointError(f"the front matter of README.md cannot be read: {one_line(error)}") from error
    if not card.startswith("---"):
        raise CheckpointError(
            "README.md has no front matter (the lines between --- that the hub reads); delete the file"
        )
    return read


def with_section(card: str, title: str, text: str) -> str:
    """Return a card that ends with this section. A former one of that title is left out."""
    return f"{_section(title).sub('', card).rstrip()}\n\n## {title}\n\n{text.strip()}\n"


def _section(title: str) -> re.Pattern[str]:
    """A section with its heading, up to the next heading of its level."""
    return re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def with_figure(card: str, title: str, caption: str) -> str:
    """Return a card that shows ``FIGURE`` under the heading of its table of layers.

    It takes the place of an earlier one. A card without that heading is returned as it is.
    """
    heading = "## What was compressed\n\n"
    shown = f"![{title}]({FIGURE})\n\n{caption}\n\n"
    return without_figure(card).replace(heading, heading + shown, 1)


def without_figure(card: str) -> str:
    """Return a card that does not show ``FIGURE``, for a folder that has no such file."""
    return _FIGURE.sub("", card)


def is_hub_name(name: str) -> bool:
    """Whether a name is that of a hub repository: ``owner/name``, and not an existing path."""
    return bool(HUB_NAME.fullmatch(name)) and not name.lower().endswith(".gguf") and not Path(name).exists()


def read_evaluation(path: Path) -> dict[str, Any] | None:
    """Read a result file of ``grasp evaluate``; ``None`` if the file is anything else."""
    try:
        document = read_json(path, "a result of `grasp evaluate`")
        values = document.get("grasp", document)
        is_result = values.keys() >= {"model", "text", "result", "size"}
        _size(document), _scores(document)
    except (GraspError, AttributeError, KeyError, TypeError, ValueError):
        return None
    return document if is_result else None


def read_license(source: str) -> dict[str, str]:
    """Return the licence keys of the card of a folder or hub repository; none if it has none or is unreachable."""
    if source == BUILTIN_NAME:
        return dict(BUILTIN_LICENSE)
    try:
        path = hf_hub_download(source, "README.md") if is_hub_name(source) else Path(source) / "README.md"
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()  # of results, which are not read
    except (*HUB_ERRORS, *BAD_ANSWERS, OSError, YAMLError):  # what is no card has values of other types
        return {}
    return {key: str(data[key]) for key in _LICENSE_KEYS if data.get(key)}


def _literal(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", printable(text))


def _code(name: str) -> str:
    """A name as code in a cell of a table."""
    return "`" + printable(name).replace("`", "'").replace("|", r"\|") + "`"


def _rows(layers: Mapping[str, _CardLayer | LowRankModule]) -> list[str]:
    groups: dict[str, dict[str, _CardLayer | LowRankModule]] = defaultdict(dict)
    for path, layer in layers.items():
        match = _LAYER.fullmatch(path)
        groups[match["layer"] if match else "model"][match["module"] if match else path] = layer
    return [
        f"| {_code(path)} | "
        + ", ".join(f"{_code(name)} {m.rank} of {min(m.in_features, m.out_features)}" for name, m in group.items())
        + f" | {sum(m.parameters for m in group.values()) / sum(m.dense_parameters for m in group.values()):.1%} |"
        for path, group in groups.items()
    ]


def _layer(layer: Pivotable) -> _CardLayer:
    bias = 0 if layer.bias is None else layer.out_features
    dense = layer.in_features * layer.out_features + bias
    return _CardLayer(layer.rank, layer.in_features, layer.out_features, parameter_count(layer), dense, layer.form)


class _Score(NamedTuple):
    """A number of an evaluation; ``on`` describes the data in words, ``data`` is its name for the hub."""

    on: str
    metric: str
    value: float
    text: str
    data: str


def _size(document: Mapping[str, Any]) -> tuple[int, bool]:
    """The parameters of the model of a result, and whether it is quantised."""
    result = document.get("grasp", document)
    parameters, size = int(result["size"]["parameters"]), int(result["size"]["bytes"])
    return parameters, bool(result.get("quantized", size < 2 * parameters))  # earlier results do not say it


def _scores(document: Mapping[str, Any]) -> list[_Score]:
    """Return the finite numbers of a result of ``grasp evaluate``."""
    evaluation = document.get("grasp", document)
    scores = []
    if (measured := evaluation["result"]) is not None and measured["perplexity"] is not None:
        text = evaluation["text"] if evaluation["text"] in NAMED_TEXTS else "a text"  # paths of files are private
        on = f"{measured['tokens']:,} tokens of {text}, windows of {measured['window']}"
        value = measured["perplexity"]
        scores.append(_Score(on, "perplexity", value, f"{value:.3f}", text))
    for task, documents, shots, metric, value, error in score_rows(document):
        if not math.isfinite(float(value)):
            continue
        on = f"{_code(task)} of lm-eval, {documents} documents, {shots} shots"
        text = value if error == "-" else f"{value} ± {error}"
        scores.append(_Score(on, metric, float(value), text, task))
    return scores


def _eval_result(score: _Score) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=score.data,
        dataset_name=score.on.replace("`", ""),
        metric_type=score.metric,
        metric_value=score.value,
    )


def _title(text: str) -> str:
    return next((line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")), "compressed model")
