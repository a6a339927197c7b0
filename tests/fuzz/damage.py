"""Random damage to a checkpoint folder: each function changes the folder, and returns a description."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 33, 2**31, 2**63, 10**30, 10**400, 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "x" * 100_000, "\x1b]0;owned\x07\x1b[2J", "[/b][red]", "\ud800", "\x00", "a\nb", "../../etc/passwd"),
    *("/dev/zero", "<script>alert(1)</script>", "${HOME}", "{{ 7 * 7 }}", "e" * 300),
    *([], {}, [[]], [None], {"": None}, ["x"] * 1000),
)
# The sizes that plain transformers believes, and for which it builds modules or takes memory before it reads a tensor.
SIZES = ("layers", "experts", "size", "heads", "n_layer", "head_dim", "dim", "positions", "num_")


class Sentinel:
    """Pickled, it creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [node for key, child in pairs for node in ((*path, key), *_nodes(child, (*path, key)))]


def _json_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.is_file())


def json_value(folder: Path, random: Random) -> str:
    """Replace, remove or rename a value in a JSON file."""
    file = random.choice([*_json_files(folder), folder / "config.json", folder / "config.json"])
    document = json.loads(file.read_text())
    nodes = _nodes(document)
    path = random.choice([node for node in nodes if len(node) <= random.randint(1, 4)] or nodes)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    kind = random.choice(["set", "set", "set", "remove", "rename", "nest"])
    if kind == "set":
        parent[path[-1]] = random.choice(VALUES)
    elif kind == "nest":
        parent[path[-1]] = [parent[path[-1]]]
    else:
        value = parent.pop(path[-1])
        if kind == "rename" and isinstance(parent, dict):
            parent[f"{path[-1]}{random.choice(['.', 'x', chr(27), '/../'])}"] = value
    file.write_text(json.dumps(document), encoding="utf-8")
    return f"{kind} {file.name} {path}"


def json_text(folder: Path, random: Random) -> str:
    """Damage the text of a JSON file."""
    file = random.choice(_json_files(folder))
    content, place = file.read_bytes(), random.randrange(file.stat().st_size)
    kinds: dict[str, Callable[[], bytes]] = {
        "truncated": lambda: content[:place],
        "a bit flipped": lambda: (
            content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :]
        ),
        "empty": lambda: b"",
        "NUL bytes": lambda: b"\x00" * 100,
        "deeply nested": lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "a list nested deeply": lambda: b"[" * 100_000,
        "a number of 5000 digits": lambda: b'{"a": ' + b"9" * 5000 + b"}",
        "a byte order mark": lambda: b"\xef\xbb\xbf" + content,
        "no UTF-8": lambda: b"\xff" + content,
        "a list": lambda: b"[]",
        "a null": lambda: b"null",
    }
    kind = random.choice(list(kinds))
    file.write_bytes(kinds[kind]())
    return f"{file.name} is {kind}"


def ranks(folder: Path, random: Random) -> str:
    """Damage ranks: values, names, the version, the mapping."""
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    table = quantization["ranks"]
    name = random.choice(list(table))
    kinds: dict[str, Callable[[], object]] = {
        "value": lambda: table.update({name: random.choice([*VALUES, 10**6, 10**9, table[name] + 1, table[name] - 1])}),
        "missing": lambda: table.pop(name),
        "name": lambda: table.update({random.choice([f"{name}.", f".{name}", "", "\x1b[2J", "lm_head", "model"]): 4}),
        "renamed": lambda: table.update({f"{name}x": table.pop(name)}),
        "many": lambda: table.update({f"model.layers.{i}.mlp.up_proj": 1 for i in range(3, 100_000)}),
        "mapping": lambda: quantization.update(ranks=random.choice(VALUES)),
        "version": lambda: quantization.update(format_version=random.choice(VALUES)),
        "no version": lambda: quantization.pop("format_version"),
        "method": lambda: quantization.update(quant_method=random.choice([*VALUES, "gptq", "bitsandbytes", "fp8"])),
        "key": lambda: quantization.update(more=1),
        "whole": lambda: config.update(quantization_config=random.choice(VALUES)),
    }
    kind = random.choice(list(kinds))
    kinds[kind]()
    (folder / "config.json").write_text(json.dumps(config))
    return f"ranks: {kind} of {name}"


# Damage to a pivoted layer, by its quantization_config, the tensors and its name: readers of weights refuse it by name.
FORMS: dict[str, Callable[[dict[str, Any], dict[str, Tensor], str], object]] = {
    "not in pivoted": lambda config, tensors, name: config["pivoted"].remove(name),
    "in pivoted without a rank": lambda config, tensors, name: config["ranks"].pop(name),
    "a rank of all outputs": lambda config, tensors, name: config["ranks"].update(
        {name: len(tensors[f"{name}.order"])}
    ),
    "no order": lambda config, tensors, name: tensors.pop(f"{name}.order"),
    "a short order": lambda config, tensors, name: _set_order(tensors, name, lambda order: order[:-1].clone()),
    "a long order": lambda config, tensors, name: _set_order(tensors, name, lambda order: order.repeat(2)),
    "an order of int64": lambda config, tensors, name: _set_order(tensors, name, Tensor.long),
    "an order of fp32": lambda config, tensors, name: _set_order(tensors, name, Tensor.float),
    "a whole U": lambda config, tensors, name: tensors.update(
        {f"{name}.U": torch.ones(len(tensors[f"{name}.order"]), len(tensors[f"{name}.Vh"]))}
    ),
    "a row above the last": lambda config, tensors, name: tensors[f"{name}.order"][-1].fill_(2**30),
    "a negative row": lambda config, tensors, name: tensors[f"{name}.order"][0].fill_(-1),
    "a row twice": lambda config, tensors, name: tensors[f"{name}.order"][1].copy_(tensors[f"{name}.order"][0]),
    "descending rows": lambda config, tensors, name: _set_order(tensors, name, lambda order: order.flip(0)),
}
# The rest is wrong in the header of the file already.
ROWS = ("a row above the last", "a negative row", "a row twice", "descending rows")


def _set_order(tensors: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors[f"{name}.order"] = change(tensors[f"{name}.order"])


def damage_form(folder: Path, kind: str, random: Random) -> str:
    """Do the damage of ``FORMS`` to one of the pivoted layers, and return its name."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / WEIGHTS)
    name = random.choice(config["quantization_config"]["pivoted"])
    FORMS[kind](config["quantization_config"], tensors, name)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return name


def forms(folder: Path, random: Random) -> str:
    """Damage the form of a pivoted layer."""
    kind = random.choice(list(FORMS))
    return f"{kind}: {damage_form(folder, kind, random)}"


def quantized(folder: Path, random: Random) -> str:
    """Damage the table of quantised modules."""
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    table = quantization["quantized"]
    storage, other = random.sample(["int8", "int4", "int4/32", "int4/64", "int8/128", "fp8"], 2)
    name = random.choice(next(iter(table.values())))
    kinds: dict[str, Callable[[], object]] = {
        "storage": lambda: table.update({random.choice([storage, "int5", "fp8", "", "int4/0"]): table.popitem()[1]}),
        "names": lambda: table.update({storage: random.choice(VALUES)}),
        "missing": lambda: table.popitem(),
        "twice": lambda: table.update({storage: [name], other: [name]}),
        "name": lambda: table.setdefault(storage, []).append(random.choice([*VALUES, "lm_head", "model.norm", "x"])),
        "low-rank": lambda: table.setdefault(storage, []).append(random.choice(list(quantization["ranks"]))),
        "mapping": lambda: quantization.update(quantized=random.choice(VALUES)),
        "version": lambda: quantization.update(format_version=random.choice([1, 2])),
    }
    kind = random.choice(list(kinds))
    kinds[kind]()
    (folder / "config.json").write_text(json.dumps(config))
    return f"quantized: {kind}"


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def header(folder: Path, random: Random) -> str:
    """Damage the header of a weight file."""
    file = random.choice(sorted(folder.glob("*.safetensors")))
    table, data = _split(file.read_bytes())
    names = [name for name in table if name != "__metadata__"]
    name, other = random.choice(names), random.choice(names)
    entry = table[name]
    kinds: dict[str, Callable[[], object]] = {
        "shape": lambda: entry.update(shape=random.choice([entry["shape"][::-1], [0], [], [2**40, 2**40], *VALUES])),
        "dtype": lambda: entry.update(dtype=random.choice(["I8", "F16", "I32", "F8_E4M3", "BOOL", "F64", *VALUES])),
        "whole numbers": lambda: entry.update(dtype="I32"),
        "offsets": lambda: entry.update(data_offsets=random.choice([[0, 4], [0, 2**62], [-1, 3], [8, 4], *VALUES])),
        "overlap": lambda: entry.update(data_offsets=table[other]["data_offsets"]),
        "swapped": lambda: table.update({name: table[other], other: table[name]}),
        "renamed": lambda: table.update({f"{name}{random.choice(['x', '.U', chr(27)])}": table.pop(name)}),
        "missing": lambda: table.pop(name),
        "metadata": lambda: table.update({"__metadata__": random.choice([{"format": "tf"}, *VALUES])}),
        "many": lambda: table.update(
            {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
        ),
    }
    kind = random.choice(list(kinds))
    kinds[kind]()
    file.write_bytes(_joined(table, data))
    return f"header of {file.name}: {kind} of {name}"


def weight_bytes(folder: Path, random: Random) -> str:
    """Damage bytes of a weight file."""
    file = random.choice(sorted(folder.glob("*.safetensors")))
    content = bytearray(file.read_bytes())
    start = 8 + struct.unpack("<Q", content[:8])[0]
    kind = random.choice(["truncated", "longer", "header length", "header bit", "data bit", "NaN", "empty"])
    if kind == "truncated":
        del content[random.randrange(len(content)) :]
    elif kind == "longer":
        content += b"\x00" * random.choice([1, 8, 4096])
    elif kind == "header length":
        content[:8] = struct.pack("<Q", random.choice([0, 1, 2**31, 2**63, start, len(content), 100_000_001]))
    elif kind == "empty":
        content.clear()
    elif kind == "NaN":
        content[start : start + 4000] = struct.pack("<f", float("nan")) * 1000
    else:
        place = random.randrange(8, start) if kind == "header bit" else random.randrange(start, len(content))
        content[place] ^= 1 << random.randrange(8)
    file.write_bytes(content)
    return f"{file.name}: {kind}"


def special_file(folder: Path, random: Random) -> str:
    """Replace a file by something else, or remove it."""
    file = random.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    other = random.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    outside = folder.parent / f"{folder.name}-outside"
    kind = random.choice(
        ["missing", "folder", "pipe", "zero", "loop", "outside", "dead", "swapped", "root", "unreadable"]
    )
    if kind == "swapped":
        content, others = file.read_bytes(), other.read_bytes()
        file.write_bytes(others)
        other.write_bytes(content)
        return f"{file.name} swapped with {other.name}"
    if kind == "outside":
        shutil.copyfile(file, outside)
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind != "missing":
        targets = {"zero": "/dev/zero", "loop": file, "outside": outside, "root": "/", "unreadable": "/proc/self/mem"}
        file.symlink_to(targets.get(kind, folder / "nothing"))
    return f"{file.name} is {kind}"


def index(folder: Path, random: Random) -> str:
    """Add an index of shards, or damage it."""
    single = folder / WEIGHTS
    if single.is_file():
        names = ["model-00001-of-00001.safetensors"]
        single.rename(folder / names[0])
        table = {name: names[0] for name in _split((folder / names[0]).read_bytes())[0] if name != "__metadata__"}
    else:
        table = json.loads((folder / INDEX).read_text())["weight_map"]
    name, shard = random.choice(sorted(table.items()))
    outside = folder.parent / f"{folder.name}-outside.safetensors"
    shutil.copyfile(folder / shard, outside)
    targets = [f"../{outside.name}", str(outside), "/dev/zero", "config.json", ".", "", "x.bin", "a\x00b", "n" * 300]
    targets += [f"./{shard}", f"sub/../{shard}", "link.safetensors", "copy.safetensors", *VALUES]
    (folder / "link.safetensors").symlink_to(outside)
    shutil.copyfile(folder / shard, folder / "copy.safetensors")
    target = random.choice(targets)
    table[name] = target
    document: dict[str, Any] = {"metadata": {}, "weight_map": table}
    if random.random() < 0.2:
        document["weight_map"] = random.choice(VALUES)
    (folder / INDEX).write_text(json.dumps(document))
    return f"index: {name} in {target!r:.60}"


def code(folder: Path, random: Random) -> str:
    """Offer code and pickles, which create the file ``ran`` beside the folder if they are run."""
    sentinel = folder.parent / "ran"
    bomb = pickle.dumps(Sentinel(sentinel))
    names = ["pytorch_model.bin", "model.pt", "training_args.bin", "adapter_model.bin", "tokenizer.pkl", ".metadata"]
    kind = random.choice(["pickle", "pickle only", "weights", "module", "adapter", "template", "kernel", "tokenizer"])
    if kind in ("pickle", "pickle only"):
        (folder / random.choice(names)).write_bytes(bomb)
        if kind == "pickle only":
            (folder / "pytorch_model.bin").write_bytes(bomb)
            for file in folder.glob("*.safetensors*"):
                file.unlink()
    elif kind == "weights":
        (folder / WEIGHTS).write_bytes(bomb)
    elif kind == "adapter":
        values = {
            "peft_type": "LORA",
            "base_model_name_or_path": "../other",
            "auto_mapping": {"parent_library": "evil"},
        }
        (folder / "adapter_config.json").write_text(json.dumps(values))
        (folder / "adapter_model.bin").write_bytes(bomb)
    elif kind == "template":
        (folder / "chat_template.jinja").write_text(
            "{{ cycler.__init__.__globals__.os.system('touch " + str(sentinel) + "') }}"
        )
    else:
        for name in ("evil", "modeling", "configuration", "tokenization"):
            (folder / f"{name}.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass Evil: pass\n")
        keys = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
        edits: dict[str, Any] = {"auto_map": dict.fromkeys(keys, "evil.Evil")}
        if kind == "kernel":
            edits = {"attn_implementation": "somebody/evil", "_attn_implementation": "somebody/evil"}
        elif random.random() < 0.5:
            edits |= {"model_type": "evil", "architectures": ["Evil"], "tokenizer_class": "Evil"}
        for file in (folder / "config.json", folder / "tokenizer_config.json"):
            file.write_text(json.dumps({**json.loads(file.read_text()), **edits}))
    return f"code: {kind}"


def card(folder: Path, random: Random) -> str:
    """Damage the model card."""
    texts = [
        "",
        "---\n",
        "---\n!!python/object/apply:os.system ['touch ran']\n---\n",
        "---\na: &a [*a]\n---\n",
        "\x1b[2J",
    ]
    texts += ["---\n" + "[" * 5000 + "\n---\n", "no front matter", "---\ntags: 3\nmodel-index: x\n---\n", "\x00"]
    text = random.choice(texts)
    (folder / "README.md").write_text(text)
    return f"card: {text!r:.40}"


def _edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    edit(document)
    file.write_text(json.dumps(document))


def _whole_numbers(folder: Path) -> None:
    table, data = _split((folder / WEIGHTS).read_bytes())
    table["model.layers.0.mlp.down_proj.weight"]["dtype"] = "I32"
    (folder / WEIGHTS).write_bytes(_joined(table, data))


# Damage that once ended a command with exit code 70.
CORPUS: dict[str, Callable[[Path], object]] = {
    "evaluate: the bare Exception of tokenizers": lambda folder: _edit_json(
        folder / "tokenizer.json", lambda document: document["model"]["vocab"].update({"6": 2**63})
    ),
    "push: a card of 5000 brackets": lambda folder: (folder / "README.md").write_text("---\n" + "[" * 5000 + "\n---\n"),
    "evaluate, recover: whole numbers as the weight of a linear": _whole_numbers,
    "report: a list as importance_kept": lambda folder: _edit_json(
        folder / "report.json", lambda document: document["modules"][0].update(importance_kept=[0.5])
    ),
}
KINDS: tuple[Callable[[Path, Random], str], ...] = (
    *(json_value, json_value, json_value, json_text, ranks, ranks, header, header),
    *(weight_bytes, special_file, index, code, card, forms, quantized),
)
