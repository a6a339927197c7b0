"""Write a random model in the shape of Qwen2.5-1.5B, and one with pivoted factors, for ``grasp bench model``.

Speed depends on shapes alone, and these need no download.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from grasp.model.hf_quantizer import mark_compressed
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import all_targets

QWEN2_1_5B = Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)
RANK_STEP = 32  # a row of U is whole cache lines


@torch.no_grad()
def write_pair(config: PreTrainedConfig, folder: Path, rank_share: float) -> None:
    """Write a random model in bf16 into ``folder/dense`` and its low-rank form into ``folder/pivoted``.

    Args:
        config: of the model.
        folder: a new or empty folder.
        rank_share: rank of each linear of the decoder layers, as a fraction of its smaller side; rounded down to a
            multiple of ``RANK_STEP``.
    """
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.get_input_embeddings().get_parameter("weight").normal_()  # so layers do not amplify rounding
    _write(model, folder / "dense")
    for target in all_targets(model):
        rank = int(rank_share * min(target.module.weight.shape)) // RANK_STEP * RANK_STEP
        model.set_submodule(target.name, LowRankLinear.like(target.module, rank, pivoted=True))
    mark_compressed(model)
    _write(model, folder / "pivoted")


def _write(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))  # loading needs some tokenizer
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def main(
    folder: Annotated[Path, typer.Argument(help="A new folder; 5 GB.")],
    rank_share: Annotated[float, typer.Option(min=0, max=1, help="Rank as a fraction of the full rank.")] = 0.55,
) -> None:
    """Write both models.

    Example: python -m benchmarks.random_pair pair &&
    grasp bench model pair/dense --compressed pair/pivoted --mode eager,compiled --batch-size 1 --windows 0
    """
    write_pair(QWEN2_1_5B, folder, rank_share)


if __name__ == "__main__":
    typer.run(main)
