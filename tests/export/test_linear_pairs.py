from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp.errors import UnsupportedModelError
from grasp.export.linear_pairs import export_linear_pairs, pair_linears_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.narrowing import narrow_mlp_
from grasp.model.targets import layer_targets
from tests.documents import run_python
from tests.quantized_models import quantized_model
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import byte_tokenizer

# GPT-2 has Conv1D; GPT-NeoX has other names in files; two MLPs of the Llama have fewer channels.
FAMILIES = ["gpt2", "gpt_neox", "gemma3", "llama"]
TOKENS = torch.arange(3, 24).reshape(3, 7)

READ = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("grasp", "grasp_kernels"):
            raise ImportError(name)

for name in [name for name in sys.modules if name.partition(".")[0] in ("grasp", "grasp_kernels")]:
    del sys.modules[name]
sys.meta_path.insert(0, Refuse())

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, dynamic_module_utils

dynamic_module_utils.HF_MODULES_CACHE = "modules"
tokens = torch.arange(3, 24).reshape(3, 7)
logits = {}
for family in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(family, trust_remote_code=True)
    model.save_pretrained(f"{family}-again")
    again = AutoModelForCausalLM.from_pretrained(f"{family}-again", trust_remote_code=True)
    with torch.no_grad():
        logits |= {family: model(tokens).logits, f"{family}-again": again(tokens).logits}
        small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
        logits[f"{family}-int8"] = small(tokens).logits
    print(family, *[name for name, module in small.named_modules() if "quantized" in str(type(module))])
save_file(logits, "logits.safetensors")
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
    print("refused")
"""


def low_rank(family: str) -> PreTrainedModel:
    """A model whose layer 1 is low-rank, partly pivoted; the MLPs of the layers 1 and 2 of a Llama are narrowed."""
    model = tiny_model(family)
    for layer in model.model.layers[1:] if family == "llama" else ():
        narrow_mlp_(layer.mlp, torch.arange(0, 48, 2), layer.mlp.down_proj.weight[:, ::2])
    for rank, target in enumerate(layer_targets(model, 1)[0], start=5):
        layer = LowRankLinear.from_dense(target.module, torch.arange(rank))
        model.set_submodule(target.name, layer)
        if rank % 2:
            assert layer.pivot_() is None
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits


@pytest.mark.slow
def test_a_process_without_grasp_loads_pairs_that_a_quantiser_of_linears_finds(tmp_path: Path) -> None:
    expected, pairs = {}, {}
    for family in FAMILIES:
        model = low_rank(family)
        expected[family] = logits(model)
        pairs[family] = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
        export_linear_pairs(model, byte_tokenizer(), tmp_path / family)
    *lines, last = run_python(READ, tmp_path, *FAMILIES).splitlines()
    assert last == "refused"
    got = load_file(tmp_path / "logits.safetensors")
    for family, line in zip(FAMILIES, lines, strict=True):
        torch.testing.assert_close(got[family], expected[family], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[f"{family}-again"], got[family], rtol=0, atol=0)
        apart = (got[f"{family}-int8"] - expected[family]).norm() / expected[family].norm()
        assert 0 < apart < 0.2
        quantised = set(line.split())
        assert {f"{name}.{index}" for name in pairs[family] for index in (0, 1)} <= quantised, family


def test_the_model_itself_computes_the_same_with_pairs() -> None:
    model = low_rank("qwen2")
    before = logits(model)
    shapes = pair_linears_(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert shapes["model.layers.1.self_attn.q_proj"] == (32, 5, 32)
    assert not hasattr(model.config, "quantization_config")


def test_a_model_without_low_rank_linears_stays_a_stock_checkpoint(tmp_path: Path) -> None:
    note = export_linear_pairs(tiny_model("llama"), byte_tokenizer(), tmp_path)
    assert "without code" in note
    assert not list(tmp_path.glob("*.py"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(tiny_model("llama")))


def test_quantised_factors_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"is quantised \(int8\); expected floating weights"):
        pair_linears_(quantized_model())
