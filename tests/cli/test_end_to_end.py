from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import command_line
from tests.command_line import RunMain


def test_compress_evaluate_and_inspect_agree_with_each_other(
    model: Path, text: Path, tmp_path: Path, main: RunMain
) -> None:
    out = tmp_path / "small"
    options = ["--num-samples", 3, "--seq-len", 32, "--layers", "0,2", "--retain-ratio", 0.4, "--batch-size", 2]
    options += ["--preset", "paper"]  # which removes no layer, so that inspect counts all dense parameters
    compressed = json.loads(main("compress", model, "-o", out, "--calibration", text, *options, "--json").out)
    report = compressed["report"]
    assert report["redundant_layers"] == [0, 2]
    assert report["config"]["retain_ratio"] == 0.4
    assert report["calibration"]["sequences"] == 3
    assert compressed["samples"] == {
        "source": str(text),
        "num_samples": 3,
        "seq_len": 32,
        "batch_size": 2,
        "seed": 0,
    }
    assert json.loads((out / "report.json").read_text()) == report

    evaluated = json.loads(main("evaluate", out, "--text", text, "--window", 64, "--json").out)
    assert evaluated["size"]["parameters"] == report["after"]["parameters"]
    assert evaluated["size"]["bytes"] == report["after"]["bytes"]
    assert 1 < evaluated["result"]["perplexity"] < 10_000

    inspected = json.loads(main("inspect", out, "--json").out)
    assert inspected["parameters"] == report["after"]["parameters"]
    assert inspected["dense_parameters"] == report["before"]["parameters"]
    assert inspected["compression_ratio"] == pytest.approx(report["compression_ratio"])
    ranks = {module["name"]: module["rank"] for module in inspected["modules"]}
    assert ranks == {module["name"]: module["rank"] for module in report["modules"] if not module["reason"]}


RELOAD = """
from transformers import AutoModelForCausalLM
import sys
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokens = model.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=8, do_sample=False)
print(repr(tokenizer.decode(tokens[0], skip_special_tokens=True)))
print(sum(type(module).__name__ == "LowRankLinear" for module in model.modules()))
print(sum(parameter.numel() for parameter in model.parameters()))
"""


@pytest.mark.slow
def test_a_real_model_is_compressed_evaluated_inspected_and_loaded_by_plain_transformers(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "The city lies on both banks of the river, and was founded by fishermen in the ninth century. Its first bridge "
        "was built of wood; after the great fire of 1471 the council had it rebuilt in stone.\n" * 4
    )
    out = tmp_path / "small"

    def run(*arguments: object) -> dict:
        process = command_line.grasp(*arguments, "--json", cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout)

    # The last layer cannot be done without, and few of its parameters are to go.
    options = ["--layers", "29", "--retain-ratio", 0.8, "--num-samples", 2, "--seq-len", 64]
    report = run("compress", "builtin", "-o", out, *options)["report"]
    assert report["config"]["basis"] == "kfac"  # the default is the best preset
    replaced = [module["name"] for module in report["modules"] if not module["reason"]]
    assert 3 < len(replaced) <= 7
    evaluated = run("evaluate", out, "--text", text, "--window", 128)
    assert evaluated["result"]["nonfinite"] == 0
    assert evaluated["result"]["perplexity"] < 100
    assert run("inspect", out)["parameters"] == report["after"]["parameters"]

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    reload = subprocess.run(
        [sys.executable, "-c", RELOAD, str(out)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert reload.returncode == 0, reload.stderr
    generated, layers, parameters = reload.stdout.splitlines()
    assert generated.startswith("'The capital of France is")
    assert len(generated) > len("'The capital of France is'") + 5
    assert int(layers) == len(replaced)
    assert int(parameters) == report["after"]["parameters"]
