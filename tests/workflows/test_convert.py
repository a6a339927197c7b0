from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from grasp import cli
from grasp.checkpoint.card import model_card, with_results
from grasp.checkpoint.compression_report import CompressionReport
from grasp.checkpoint.inspection import inspect_checkpoint
from grasp.checkpoint.saving import save_checkpoint
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.errors import CheckpointError, NonFiniteError
from grasp.model.layer_removal import remove_layers_
from grasp.workflows.convert import convert, convert_, with_forms
from tests.checkpoint_edits import edit_tensors
from tests.tiny_models import tiny_batches, tiny_model
from tests.tiny_tokenizers import byte_tokenizer

UP, FULL = "model.layers.1.mlp.up_proj", "model.layers.2.self_attn.k_proj"
REASON = "its rank is the number of its outputs, 16"


def compressed() -> tuple[PreTrainedModel, CompressionReport]:
    """A Qwen2 with biases, whose layers 1 and 2 are low-rank. One of the 14 linears has no pivoted form."""
    model = tiny_model("qwen2", vocab_size=len(byte_tokenizer()))
    report = compress_(model, tiny_batches(1), GraspConfig(layers=(1, 2), retain_ratio=0.5))
    model.get_submodule(FULL).set_factors_(torch.randn(16, 16), torch.randn(16, 32))
    return model, with_forms(report, model)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, report = compressed()
    values = {"perplexity": 9.0, "tokens": 9, "window": 9}
    result = {"model": "m", "text": "builtin", "result": values, "size": vars(report.after)}
    card = model_card(model, base_model="owner/model", details="## Mine\n\nText.")
    texts = {"report.json": report.to_json(), "recovery.json": "{}", "LICENSE": "Mine.", "result.json": "{}"}
    return save_checkpoint(
        *(model, tmp_path_factory.mktemp("place") / "small"),
        tokenizer=byte_tokenizer(),
        card=with_results(card, [result], parameters=report.after.parameters),
        extra_files=texts,
    )


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(tiny_batches(1)[0]).logits


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_with_the_name_of_the_built_in_model_is_the_folder(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("builtin", "model.gguf"):
        (tmp_path / name).symlink_to(small)
        assert len(convert(Path(name), Path(f"{name}-out"), "pivoted").converted) == 13


def test_a_pivoted_checkpoint_has_fewer_parameters_and_the_same_logits_and_says_so(small: Path, tmp_path: Path) -> None:
    result = convert(small, tmp_path / "out", "pivoted")
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == names(small) - {"result.json"}
    assert (len(result.converted), dict(result.left), result.omitted) == (13, {FULL: REASON}, ("result.json",))
    before, after = (load_file(folder / "model.safetensors") for folder in (small, tmp_path / "out"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"{name}.{factor}" for name in result.converted for factor in ("U", "Vh")
    }
    torch.testing.assert_close(logits(tmp_path / "out"), logits(small), rtol=1e-5, atol=1e-5)

    found, report = inspect_checkpoint(tmp_path / "out"), CompressionReport.load(tmp_path / "out")
    ranks = {module.name: module.rank for module in found.modules}
    saved = sum(rank**2 for name, rank in ranks.items() if name != FULL)
    assert found.parameters == report.after.parameters == CompressionReport.load(small).after.parameters - saved
    assert found.bytes == report.after.bytes
    assert {(m.name, m.form, m.parameters, m.bytes) for m in found.modules} == {
        (m.name, m.form, m.parameters_after, m.bytes_after) for m in report.compressed
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card == model_card(model, base_model="owner/model", details="## Mine\n\nText.")


def test_of_licences_only_texts_are_copied_and_the_others_are_named(small: Path, tmp_path: Path) -> None:
    source = shutil.copytree(small, tmp_path / "source")
    (source / "LICENSES").mkdir()
    (source / "LICENSE.pdf").write_bytes(b"%PDF-1.7 \xe2\xe3")
    result = convert(source, tmp_path / "out", "pivoted")
    assert result.omitted == ("LICENSE.pdf", "LICENSES", "result.json")
    assert (tmp_path / "out" / "LICENSE").read_text() == "Mine."


def test_a_full_disk_is_refused_before_the_layers_are_converted(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    monkeypatch.setattr("grasp.workflows.convert.convert_", lambda *_: pytest.fail("was converted"))
    with pytest.raises(CheckpointError, match="GB are free"):
        convert(small, tmp_path / "out", "pivoted")


def test_there_and_back_gives_the_same_model_and_report(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "pivoted", "pivoted")
    result = convert(tmp_path / "pivoted", tmp_path / "back", "factored")
    assert (len(result.converted), dict(result.left)) == (13, {})
    torch.testing.assert_close(logits(tmp_path / "back"), logits(tmp_path / "pivoted"), rtol=1e-6, atol=1e-6)
    for name in ("config.json", "report.json"):
        assert (tmp_path / "back" / name).read_bytes() == (small / name).read_bytes()


def test_the_result_is_shown_and_a_form_that_all_have_gives_a_copy(small: Path, tmp_path: Path) -> None:
    outputs = []
    for source, output in ((small, "out"), (tmp_path / "out", "again")):
        arguments = ["convert", str(source), "-o", str(tmp_path / output), "--to", "pivoted"]
        result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.exception
        outputs.append(result.stdout)
        assert f"left: 1 linears such as {FULL}: {REASON}" in result.stdout
    assert "13 of 14 linears, pivoted now" in outputs[0]
    assert "not copied: result.json" in outputs[0]
    assert "Nothing was converted: 13 of 14 linears were pivoted." in outputs[1]
    for name in ("model.safetensors", "report.json", "README.md", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_report_numbers_layers_as_before_removal() -> None:
    model, report = compressed()
    convert_(model, "pivoted")
    remove_layers_(model, [0])
    expected = [module.form for module in with_forms(report, model).modules]
    report = with_forms(replace(report, removed_layers=(0,)), model)
    assert {module.name for module in report.modules if module.form == "factored"} == {FULL}
    assert report.after.decoder_parameters == sum(p.numel() for p in model.model.layers.parameters())
    assert expected != [module.form for module in report.modules]


def test_what_cannot_be_converted_is_refused_and_nothing_is_written(small: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    tiny_model("llama").save_pretrained(dense)
    damaged = save_checkpoint(compressed()[0], tmp_path / "damaged", tokenizer=byte_tokenizer())
    edit_tensors(damaged, lambda tensors: tensors[f"{UP}.U"][0, 0].fill_(torch.nan))
    before = names(tmp_path)
    for source, output, form, error, message in (
        (dense, "out", "pivoted", CheckpointError, "is not compressed: its config.json has no ranks"),
        (tmp_path / "none", "out", "pivoted", CheckpointError, "no folder .*none; expected a checkpoint"),
        (small, "dense", "pivoted", CheckpointError, "is not empty"),
        (small, "out", "dense", ValueError, "form must be factored or pivoted, got 'dense'"),
        (damaged, "out", "pivoted", NonFiniteError, f"{UP}: U or Vh has NaN"),
    ):
        with pytest.raises(error, match=message):
            convert(source, tmp_path / output, form)
    assert names(tmp_path) == before
