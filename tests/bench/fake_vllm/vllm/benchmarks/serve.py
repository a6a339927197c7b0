"""A client that writes numbers as vLLM's does: the model ``small`` takes half the time.

Half of all requests are good. With prompts of 7 tokens one token is missing; with 9 the client fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from pathlib import Path

TEXTS = ("base-url", "model", "tokenizer", "dataset-name", "percentile-metrics", "metric-percentiles", "result-dir")
NUMBERS = ("seed", "num-prompts", "random-input-len", "random-output-len", "max-concurrency", "num-warmups")


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    for names, kind in ((TEXTS, str), (NUMBERS, int), (("temperature",), float), (("result-filename",), Path)):
        for name in names:
            parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--goodput", nargs="+")
    parser.add_argument("--save-result", action="store_true")
    parser.add_argument("--save-detailed", action="store_true")
    parser.add_argument("--disable-tqdm", action="store_true")


def main(args: argparse.Namespace) -> None:
    with urllib.request.urlopen(f"{args.base_url}/v1/models") as answer:
        assert json.load(answer)["data"][0]["id"] == args.model
    assert Path(args.tokenizer, "tokenizer.json").is_file()
    if args.random_input_len == 9:
        sys.exit("no such tokenizer")
    slowness = 1.0 if args.model == "small" else 2.0
    duration = slowness * args.num_prompts / args.max_concurrency
    result = {
        "completed": args.num_prompts,
        "total_output_tokens": args.num_prompts * args.random_output_len - (args.random_input_len == 7),
        "duration": duration,
        "request_throughput": args.num_prompts / duration,
        "output_throughput": args.num_prompts * args.random_output_len / duration,
        "request_goodput": 0.5 * args.num_prompts / duration if args.goodput else None,
        "started": time.time(),
        "errors": ["", "HTTP 400"],
        "backend": "openai",
        "std_ttft_ms": float("nan"),
    }
    for metric in args.percentile_metrics.split(","):
        for percent in args.metric_percentiles.split(","):
            result[f"p{percent}_{metric}_ms"] = slowness * float(percent) + args.seed % 10
    Path(args.result_dir, args.result_filename).write_text(json.dumps(result))
