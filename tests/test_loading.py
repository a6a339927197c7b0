from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError
from transformers import BertConfig, LlamaForSequenceClassification, LlamaModel, T5Config

from grasp import loading
from grasp.errors import CheckpointError, GraspError, ModelNotFoundError, OutOfMemoryError, UnsupportedModelError
from grasp.hub import HUB_ERRORS
from grasp.loading import load_model
from grasp.model.hf_quantizer import mark_compressed
from grasp.model.lowrank_linear import LowRankLinear
from tests.checkpoint_edits import edit_json, edit_tensors
from tests.tiny_models import tiny_batches, tiny_model
from tests.tiny_tokenizers import byte_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model in bfloat16, with a tokenizer."""
    tiny_model("llama", torch.bfloat16).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_a_folder_gives_its_model_and_tokenizer(folder: Path, dtype: str, expected: torch.dtype) -> None:
    model, tokenizer = load_model(str(folder), dtype=dtype, device="cpu")
    assert not model.training
    original = tiny_model("llama", torch.bfloat16).state_dict()
    assert model.state_dict().keys() == original.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected
        assert torch.equal(tensor, original[name].to(expected))
    assert tokenizer("text").input_ids == byte_tokenizer()("text").input_ids


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
)
def test_a_model_that_does_not_fit_into_memory_is_named_with_the_remedy(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", Mock(side_effect=error))
    with pytest.raises(OutOfMemoryError, match=f"too little memory to load {folder} on cpu; load it as bfloat16, or"):
        load_model(str(folder), device="cpu")


def test_a_compressed_checkpoint_is_loaded_compressed(folder: Path) -> None:
    model, tokens = tiny_model("llama"), tiny_batches(1)[0]
    name = "model.layers.1.mlp.up_proj"
    model.set_submodule(name, LowRankLinear.from_dense(model.get_submodule(name), torch.arange(4)))
    mark_compressed(model)
    model.save_pretrained(folder)
    loaded, _ = load_model(str(folder), device="cpu")
    assert isinstance(loaded.get_submodule(name), LowRankLinear)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_whole_numbers_as_weights_of_a_compressed_model_are_refused(folder: Path) -> None:
    model, name = tiny_model("llama"), "model.layers.1.mlp.up_proj"
    model.set_submodule(name, LowRankLinear.from_dense(model.get_submodule(name), torch.arange(4)))
    mark_compressed(model)
    model.save_pretrained(folder)
    dense = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({dense: tensors[dense].int()}))
    with pytest.raises(CheckpointError, match=rf"{dense} of .* has the dtype torch.int32"):
        load_model(str(folder))


def test_the_device_is_the_gpu_where_there_is_one(folder: Path) -> None:
    model, _ = load_model(str(folder))
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16; got 'int8'"),
        ({"device": "gpu"}, "device must be a name such as cpu, cuda or cuda:1; got 'gpu'"),
        ({"device": "cuda:99"}, "PyTorch has .* got device cuda:99"),
        ({"device": "meta"}, "PyTorch has 0 meta devices, got device meta"),
        ({"device": "xpu:99"}, "PyTorch has .* got device xpu:99"),
        ({"device": "mps:99"}, "PyTorch has .* got device mps:99"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_loaded(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model("nowhere", **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no-such-folder", r"no folder \./no-such-folder\. Give a folder with a config\.json"),
        ("/no/such/folder/", "no folder /no/such/folder/"),
        ("a/b/c", "no folder a/b/c"),
        ("my--model", "no folder my--model"),
        ("", "no folder"),
        ("no-such-file.gguf", r"no file no-such-file\.gguf; expected the path of a GGUF file"),
    ],
)
def test_paths_to_nothing_are_refused_without_asking_the_hub(name: str, message: str, no_hub: None) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        load_model(name)


def test_folders_that_are_no_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json.*: nothing"):
        load_model(str(tmp_path))
    for i in range(7):
        (tmp_path / f"file{i}").touch()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json.*: file0, .*, file4, …\."):
        load_model(str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="file0 is not a GGUF file"):
        load_model(str(tmp_path / "file0"))


def response(error_class: type[Exception]) -> Exception:
    error = error_class.__new__(error_class)
    Exception.__init__(error, "what the hub says")
    error.response = SimpleNamespace(status_code=503)  # type: ignore[attr-defined]
    return error


def answer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def model_info(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(loading.HfApi, "model_info", model_info)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, AssertionError("the hub was asked"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (response(RepositoryNotFoundError), "some/model is neither a local folder nor a public model"),
        (response(GatedRepoError), "access to some/model is restricted.* hf auth login"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE.*'builtin'"),
        (
            ConnectionError("no route"),
            r"hub cannot be reached \(no route\).*'builtin' needs no network",
        ),
        (response(HUB_ERRORS[0]), r"and the hub answers HTTP 503 Service Unavailable\."),
        (RecursionError("deep JSON"), r"does not answer as a hub does \(deep JSON\)"),
    ],
)
def test_what_the_hub_answers_is_said_in_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, error)
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        load_model("some/model")
    assert "\n" not in str(caught.value)


def drop_tensor(folder: Path) -> None:
    model = tiny_model("llama", torch.bfloat16)
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(folder, state_dict=state)


def truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def edit_config(folder: Path, file: str = "config.json", **values: object) -> None:
    edit_json(folder / file, lambda config: config.update(values))


def rank_tied_head(folder: Path) -> None:
    tiny_model("llama", torch.bfloat16, tie_word_embeddings=True).save_pretrained(folder)
    edit_config(folder, quantization_config={"quant_method": "grasp", "format_version": 1, "ranks": {"lm_head": 4}})


def write_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").rename(folder / "w.bin")
    (folder / "model.safetensors.index.json").write_text(text)


def link_shard(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    shard = (folder / "model.safetensors").rename(folder.parent / "elsewhere/model-1.safetensors")
    (folder / shard.name).symlink_to(shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard.name}}))


def repeat_shard(folder: Path) -> None:
    names = ["model-1.safetensors", "model-2.safetensors"]
    shutil.copy(folder / "model.safetensors", folder / names[1])
    (folder / "model.safetensors").rename(folder / names[0])
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", names, strict=True))})
    )


def pipe(folder: Path, name: str = "model.safetensors") -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def endless(folder: Path) -> None:
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)


DAMAGE: dict[str, tuple[Callable[[Path], object], type[GraspError], str]] = {
    "a tensor is missing": (
        drop_tensor,
        CheckpointError,
        r"lacks 1 tensors .*model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "the file is cut short": (truncate_weights, CheckpointError, r"model\.safetensors cannot be read"),
    "weights are missing": (
        lambda folder: (folder / "model.safetensors").unlink(),
        CheckpointError,
        "has no .safetensors file",
    ),
    "shapes differ": (
        lambda folder: edit_config(folder, hidden_size=64),
        CheckpointError,
        r"lm_head.weight of .* has the shape \(97, 32\), its configuration asks for \(97, 64\)",
    ),
    "the configuration is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        UnsupportedModelError,
        r"config\.json is not JSON",
    ),
    "the configuration is nested deeply": (
        lambda folder: (folder / "config.json").write_text(100_000 * '{"a":'),
        UnsupportedModelError,
        r"config\.json has more than 100 levels",
    ),
    "the tokenizer is a pipe": (lambda folder: pipe(folder, "tokenizer.json"), CheckpointError, "json is no regular"),
    "the tokenizer is endless": (endless, CheckpointError, r"tokenizer\.json has more than 256\.0 MB"),
    "the chat template is a device": (
        lambda folder: (folder / "chat_template.jinja").symlink_to("/dev/zero"),
        CheckpointError,
        r"chat_template\.jinja is a link that leads out of its folder",
    ),
    "the family is unknown": (
        lambda folder: edit_config(folder, model_type="no-such-family"),
        UnsupportedModelError,
        "configuration of .* cannot be used: .*no-such-family",
    ),
    "it brings its own code": (
        lambda folder: edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"}),
        UnsupportedModelError,
        "needs code of its own, which is never run; .* a folder that `grasp convert` wrote",
    ),
    "an encoder-decoder": (
        lambda folder: T5Config().save_pretrained(folder),
        UnsupportedModelError,
        r"type 't5' \(no architecture\)",
    ),
    "a classifier": (
        lambda folder: LlamaForSequenceClassification(tiny_model("llama").config).save_pretrained(folder),
        CheckpointError,
        r"lacks 1 tensors .*lm_head\.weight",
    ),
    "a model without a head": (
        lambda folder: LlamaModel(tiny_model("llama").config).save_pretrained(folder),
        CheckpointError,
        r"lacks 1 tensors .*lm_head\.weight",
    ),
    **{
        f"{key} is {value!r}": (
            lambda folder, key=key, value=value: edit_config(folder, **{key: value}),  # type: ignore[misc]
            GraspError,
            "(configuration|weights) of .* cannot be",
        )
        for key, value in [
            ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
            ("quantization_config", {"quant_method": "gptq", "bits": 4}),
            ("quantization_config", "grasp"),
            ("hidden_act", "no-such-act"),
            ("rope_parameters", {"rope_type": "no-such-rope", "rope_theta": 1e4}),
            ("hidden_size", "abc"),
            ("num_attention_heads", 5),
            ("num_attention_heads", 0),
            ("dtype", "floaty"),
        ]
    },
    "the tokenizer is empty": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        ModelNotFoundError,
        "tokenizer of .* cannot be loaded",
    ),
    "the weights are pickled": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        CheckpointError,
        r"pickled weights, such as \.bin",
    ),
    "the index names a pickle": (
        lambda folder: write_index(folder, '{"weight_map": {"lm_head.weight": "w.bin"}}'),
        CheckpointError,
        r"pickled weights, such as \.bin",
    ),
    "the index is none": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        CheckpointError,
        r"index\.json is a JSON list",
    ),
    "the index leads to another folder": (
        lambda folder: write_index(folder, '{"weight_map": {"lm_head.weight": "../other/model.safetensors"}}'),
        CheckpointError,
        r"index\.json names '\.\./other/model\.safetensors', which is not in its folder",
    ),
    "a shard is a link to another folder": (
        link_shard,
        CheckpointError,
        r"model-1\.safetensors is a link that leads out of its folder",
    ),
    "two shards have the same tensor": (
        repeat_shard,
        CheckpointError,
        "has the tensor .*, which another file has too",
    ),
    "there are more layers than tensors": (
        lambda folder: edit_config(folder, num_hidden_layers=10**9),
        CheckpointError,
        "1000000000 layers, but its files only",
    ),
    "the configuration names a kernel": (
        lambda folder: edit_config(folder, attn_implementation="somebody/attention"),
        UnsupportedModelError,
        "kernel 'somebody/attention', which is code",
    ),
    "the configuration names weights elsewhere": (
        lambda folder: edit_config(folder, transformers_weights="../other/model.safetensors"),
        CheckpointError,
        r"transformers_weights '\.\./other/model\.safetensors'",
    ),
    "the weights are a pipe": (pipe, CheckpointError, r"model\.safetensors is no regular file"),
    "a rank for the tied head": (
        rank_tied_head,
        CheckpointError,
        "weights of .* cannot be loaded|ranks name lm_head",
    ),
    "the tokenizer loads and does not run": (
        lambda folder: edit_config(folder, "tokenizer_config.json", model_max_length="x"),
        ModelNotFoundError,
        "tokenizer of .* cannot be loaded",
    ),
    "no tokenizer": (
        lambda folder: [file.unlink() for file in folder.glob("token*")],
        ModelNotFoundError,
        r"tokenizer of .* cannot be loaded .*tokenizer\.save_pretrained",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_or_unfit_folders_are_refused(damage: str, folder: Path) -> None:
    inflict, error, message = DAMAGE[damage]
    inflict(folder)
    with pytest.raises(error, match=message) as caught:
        load_model(str(folder), device="cpu")
    assert "trust_remote_code" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_code_file_in_the_folder_is_not_run(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.OwnConfig"})
    (folder / "own.py").write_text("raise SystemExit('this ran')")
    model, _ = load_model(str(folder), device="cpu")  # the library knows the family itself
    assert type(model).__name__ == "LlamaForCausalLM"


def test_encoders_are_no_causal_models(folder: Path) -> None:
    BertConfig(is_encoder_decoder=True).save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match="type 'bert'"):
        load_model(str(folder))


def test_a_snapshot_in_the_hubs_cache_is_read_through_its_links(folder: Path) -> None:
    snapshot, blobs = folder.parent / "models--a--b/snapshots/c0ffee", folder.parent / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    tokenizer_files = [file.name for file in folder.glob("token*")]
    load_model(str(folder), device="cpu")[0].save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    for number, file in enumerate(folder.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert tokenizer_files
    assert load_model(str(snapshot), device="cpu")[0].num_parameters()
