"""Compress a model, compare its perplexity before and after, and save a checkpoint that transformers loads.

python examples/compress.py builtin small
python examples/compress.py ./my-model my-model-small --text corpus.txt --samples 128 --tokens 512
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM

from grasp import GraspConfig, compress_, perplexity
from grasp.calibration import read_text, token_batches, tokenize
from grasp.loading import load_model


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hub name, a folder, a GGUF file, or builtin")
    parser.add_argument("output", type=Path, help="folder for the checkpoint")
    parser.add_argument("--text", default="builtin", help="wikitext2, c4, builtin or a text file")
    parser.add_argument("--layers", type=int, default=2, help="how many layers to compress")
    parser.add_argument("--samples", type=int, default=8, help="calibration sequences")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each sequence")
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model)
    held_out = tokenize(tokenizer, read_text(arguments.text, split="evaluation"))[: 8 * arguments.tokens]
    before = perplexity(model, held_out, window=arguments.tokens).perplexity

    # GraspConfig.best(compression_ratio=0.1) loses far less, but needs minutes and memory.
    text = read_text(arguments.text, split="calibration")
    batches = token_batches(tokenizer, text, num_samples=arguments.samples, seq_len=arguments.tokens)
    report = compress_(model, batches, GraspConfig.paper(num_layers=arguments.layers, schedule="single-sweep"))
    after = perplexity(model, held_out, window=arguments.tokens).perplexity
    print(f"layers {report.redundant_layers}, {report.compression_ratio:.1%} of the parameters removed")
    print(f"perplexity {before:.1f} before, {after:.1f} after")

    # An ordinary checkpoint: no import of grasp is needed to load it.
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    loaded = AutoModelForCausalLM.from_pretrained(arguments.output)
    print(f"{loaded.num_parameters()} parameters in {arguments.output}")


if __name__ == "__main__":
    main()
