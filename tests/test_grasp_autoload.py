from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedModel

import grasp_autoload
from grasp.method.storage import Storage
from grasp.model.lowrank_linear import LowRankLinear
from tests.quantized_models import random_like
from tests.tiny_models import tiny_batches, tiny_model

INSTALLED = any(point.value == "grasp_autoload:install" for point in entry_points(group="torch.backends"))
needs_install = pytest.mark.skipif(not INSTALLED, reason="grasp-llm is not installed in this environment")
UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
# Loads the folder argv[1] and leaves state and logits in argv[2]; its first line stands before all other imports.
LOAD = """
import sys
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
import torch
tokens = torch.load(sys.argv[3])
with torch.no_grad():
    torch.save((model.state_dict(), model(tokens).logits), sys.argv[2])
from torch.utils.flop_counter import flop_registry
assert torch.ops.grasp.lowrank_linear in flop_registry
"""


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process away from the checkout, with no import path but the installed packages."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd="/",
        env=variables | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def model() -> PreTrainedModel:
    model = tiny_model("llama")
    model.set_submodule(UP, LowRankLinear.from_dense(model.get_submodule(UP), torch.arange(4)))
    model.set_submodule(DOWN, random_like(model.get_submodule(DOWN), Storage(8)))
    return model


@pytest.fixture
def files(model: PreTrainedModel, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A saved checkpoint, where the outcome of loading goes, and a saved batch of tokens."""
    import_module("grasp.checkpoint.saving").save_checkpoint(model, tmp_path / "model")
    torch.save(tiny_batches(1)[0], tmp_path / "tokens.pt")
    return tmp_path / "model", tmp_path / "outcome.pt", tmp_path / "tokens.pt"


@pytest.mark.slow
@needs_install
@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModelForCausalLM",
        # torch is first imported from the middle of the module that is hooked
        "import transformers.quantizers.auto; from transformers import AutoModelForCausalLM",
    ],
)
def test_a_process_that_never_imports_grasp_loads_the_same_bits_and_logits(
    model: PreTrainedModel, files: tuple[Path, Path, Path], first: str
) -> None:
    result = python(first + LOAD, *files, HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert (result.returncode, result.stderr) == (0, "")
    state, logits = torch.load(files[1])
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []
    with torch.no_grad():
        assert torch.equal(logits, model(torch.load(files[2])).logits)


@pytest.mark.slow
@needs_install
def test_importing_torch_imports_neither_grasp_nor_transformers() -> None:
    result = python("import torch, sys; print([name.partition('.')[0] for name in sys.modules])")
    assert result.returncode == 0, result.stderr
    loaded = set(eval(result.stdout))
    assert "grasp_autoload" in loaded
    assert not loaded & {"grasp", "grasp_kernels", "transformers"}


@pytest.mark.slow
@needs_install
def test_with_autoloading_off_transformers_refuses_and_importing_grasp_helps(files: tuple[Path, Path, Path]) -> None:
    code = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print(str(error).partition(": install ")[2])
import grasp
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[1].mlp.up_proj).__name__)
"""
    result = python(code, files[0], TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.returncode == 0, result.stderr
    remedy = "grasp-llm, or `import grasp` before loading where TORCH_DEVICE_BACKEND_AUTOLOAD=0"
    assert result.stdout.splitlines() == [remedy, "LowRankLinear"]


@pytest.mark.slow
def test_where_grasp_does_not_exist_every_class_refuses_the_folder_with_the_remedy(
    files: tuple[Path, Path, Path],
) -> None:
    code = """
import sys
for name in ("grasp", "grasp_autoload", "grasp_kernels"):
    sys.modules[name] = None
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, pipeline
for load in (
    *(cls.from_pretrained for cls in (AutoModel, AutoModelForCausalLM, LlamaForCausalLM)),
    lambda folder: pipeline("text-generation", folder),
):
    try:
        load(sys.argv[1])
    except ValueError as error:
        print("install grasp-llm" in str(error))
"""
    result = python(code, files[0], TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.stdout.split() == ["True"] * 4, result.stderr


@pytest.mark.slow
@needs_install
@pytest.mark.parametrize("error", ["OSError: library is gone", "SystemExit: 3"])  # a script called grasp.py may exit
def test_a_broken_grasp_does_not_break_transformers(error: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    (tmp_path / "grasp").mkdir()
    name, text = error.split(": ")
    (tmp_path / "grasp/__init__.py").write_text(f"raise {name}({text!r})")
    code = "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained('dense')"
    result = python(f"import os, sys; os.chdir({str(tmp_path)!r}); sys.path.insert(0, ''); {code}")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(f"importing grasp.model.hf_quantizer raised {error}") == 1


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Modules that stand in for transformers' and grasp's own: what happened, in order, is in the list."""
    events: list[str] = []
    checkpoint = ModuleType("grasp.model.hf_quantizer")
    checkpoint.register = lambda: events.append("registered")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "grasp.model.hf_quantizer", checkpoint)
    (tmp_path / "stand_in_tables.py").write_text(
        f"events.append('tables')\n{' = '.join(grasp_autoload._NAMES)} = None\n"
    )
    (tmp_path / "stand_in_loader.py").write_text("events.append('loader')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("builtins.events", events, raising=False)
    monkeypatch.setattr(grasp_autoload, "_TABLES", "stand_in_tables")
    monkeypatch.setattr(grasp_autoload, "_LOADER", "stand_in_loader")
    others = [finder for finder in sys.meta_path if type(finder).__name__ != "_Finder"]
    monkeypatch.setattr(sys, "meta_path", others)
    yield events
    for name in ("stand_in_tables", "stand_in_loader"):
        sys.modules.pop(name, None)


def test_registers_right_after_the_tables_are_imported_and_only_then(watched: list[str]) -> None:
    grasp_autoload.install()
    assert watched == []
    tables = import_module("stand_in_tables")
    assert watched == ["tables", "registered"]
    import_module("stand_in_loader")
    assert watched == ["tables", "registered", "loader"]
    assert tables.__spec__ is not None
    assert tables.__loader__ is tables.__spec__.loader
    assert type(tables.__loader__).__name__ == "SourceFileLoader"


def test_installing_twice_hooks_once(watched: list[str]) -> None:
    before = len(sys.meta_path)
    grasp_autoload.install()
    grasp_autoload.install()
    assert len(sys.meta_path) == before + 1
    import_module("stand_in_tables")
    assert watched == ["tables", "registered"]


def test_registers_at_once_where_the_tables_are_there_already(watched: list[str]) -> None:
    import_module("stand_in_tables")
    grasp_autoload.install()
    assert watched == ["tables", "registered"]


def test_waits_for_the_loader_where_the_tables_are_being_imported(
    watched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "stand_in_tables", ModuleType("stand_in_tables"))
    grasp_autoload.install()
    assert watched == []
    import_module("stand_in_loader")
    assert watched == ["loader", "registered"]


@pytest.mark.parametrize("error", [ImportError("no such name"), AttributeError("gone"), RuntimeError("clash")])
def test_a_failure_to_register_is_logged_and_not_raised(
    watched: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(sys.modules["grasp.model.hf_quantizer"], "register", fail)
    grasp_autoload.install()
    with caplog.at_level(logging.WARNING, logger="grasp"):
        import_module("stand_in_tables")
    assert watched == ["tables"]
    assert f"raised {type(error).__name__}: {error}" in caplog.text


def test_being_led_to_by_the_import_of_grasp_itself_is_no_failure(
    watched: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(sys.modules["grasp.model.hf_quantizer"], "register")
    grasp_autoload.install()
    import_module("stand_in_tables")
    assert watched == ["tables"]
    assert caplog.text == ""


def test_a_hooked_module_that_is_not_there_is_not_found(watched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grasp_autoload, "_TABLES", "stand_in_absent")
    grasp_autoload.install()
    with pytest.raises(ModuleNotFoundError, match="stand_in_absent"):
        import_module("stand_in_absent")
    assert watched == []


ORDERS = [
    ("grasp.model.hf_quantizer",),
    ("grasp.model.skeleton", "transformers"),
    ("torch", "grasp.model.hf_quantizer"),
    ("transformers", "grasp.compress"),
    ("transformers.quantizers.auto", "grasp.model.lowrank_linear"),
    ("grasp", "torch", "transformers", "grasp.model.hf_quantizer"),
]


@pytest.mark.slow
@needs_install
@pytest.mark.parametrize("order", ORDERS, ids=",".join)
def test_no_order_of_imports_logs_anything(order: tuple[str, ...], fuzzing: bool) -> None:
    if not fuzzing and order != ORDERS[0]:
        pytest.skip("runs with --fuzz")
    result = python("; ".join(f"import {name}" for name in order))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
