"""llama.cpp as a yardstick from outside: a GGUF file, timed like our models, on the same prompts."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.bench.decoding import TOLERANCE, Case, difference
from grasp.errors import GraspError, MissingPackageError
from grasp.evaluation.generation import GenerationTime, random_prompt
from grasp.export.gguf_file import write_gguf
from grasp.files import expanded
from grasp.model.targets import vocabulary_size
from grasp.progress import Progress, no_progress, one_step

LLAMA_CPP = "llama.cpp"
QUANTIZED = 0.5  # larger norm-wise relative differences of logits are those of another model
_KV_BYTES = 2  # of a key or value, F16
_CONTEXT_STEP = 256  # positions
_CALLBACKS: list[Any] = []  # that llama.cpp may call until the process ends


class Agreement(NamedTuple):
    """How close a yardstick's model is to the dense one: difference of logits, and greedy tokens that are the same."""

    apart: float
    same: int
    tokens: int


class Yardstick:
    """A model in llama.cpp, with as many threads as PyTorch has. Call ``prepare`` before the rest.

    Attributes:
        name: of the provider.
        load_s: seconds that loading took.
        parameters: number of parameters.
        weight_bytes: bytes of the tensors.
        device: the CPU.

    Args:
        name: of the provider.
        path: the GGUF file.
        dense: the model whose prompts it gets.
        tolerance: largest norm-wise relative difference of its logits from those of ``dense``.

    Raises:
        GraspError: if llama.cpp cannot load the file, or its vocabulary is another one.
    """

    device = torch.device("cpu")

    def __init__(self, name: str, path: Path, dense: PreTrainedModel, tolerance: float = QUANTIZED) -> None:
        self._lib = load_llama_cpp()
        self.name, self.tolerance, self._dense = name, tolerance, dense
        self._context: Any = None
        start = time.perf_counter()
        options = self._lib.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise GraspError(f"llama.cpp cannot load {path}; expected a GGUF file of a model that it knows")
        self.load_s = time.perf_counter() - start
        self.parameters = int(self._lib.llama_model_n_params(self._model))
        self.weight_bytes = int(self._lib.llama_model_size(self._model))
        self._vocabulary = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        if self._vocabulary != (expected := vocabulary_size(dense)):
            self.close()
            raise GraspError(
                f"{path} has {self._vocabulary} tokens, but the dense model {expected}; give a file of the same model"
            )

    @property
    def about(self) -> str:
        """The package, for the conditions."""
        return f"llama-cpp-python {self._lib.__version__}"

    def prepare(self, case: Case) -> None:
        """Make room for generations of these sizes, with the present number of threads."""
        self._free()
        lib, options = self._lib, self._lib.llama_context_default_params()
        positions = case.depth + case.prompt_tokens + case.new_tokens
        options.n_ctx = case.batch_size * -(-positions // _CONTEXT_STEP) * _CONTEXT_STEP
        options.n_seq_max = case.batch_size
        options.n_batch = max(options.n_batch, case.batch_size * max(case.depth, case.prompt_tokens))
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = lib.llama_init_from_model(self._model, options)
        if not self._context:
            raise GraspError(f"llama.cpp has no room for {case.batch_size} sequences of {positions} tokens")

    def generate(self, case: Case) -> GenerationTime:
        """The times of one generation, as those of ``time_generation``."""
        return self._run(case)[0]

    @torch.inference_mode()
    def agreement(self, case: Case) -> Agreement:
        """Compare one generation with the dense model, which gets the same tokens."""
        _, logits, tokens = self._run(case)
        prompt = self._prompt(case)
        whole = torch.cat([prompt, tokens], dim=1).to(self._dense.device)
        expected = self._dense(input_ids=whole[:, :-1]).logits[:, prompt.shape[1] - 1 :].cpu()
        same = (expected.argmax(-1) == tokens).cumprod(1).sum(1)
        return Agreement(difference(logits[None], expected[None, :, 0]), int(same.min()), tokens.shape[1])

    def logits(self, tokens: Tensor) -> Tensor:
        """The logits (B, L, V) after each of the tokens (B, L), fp32."""
        batch, length = tokens.shape
        self.prepare(Case(batch, length, 0, 0))
        with self._batch(tokens.numpy(), 0, every=True) as given:
            return torch.from_numpy(self._decode(given).reshape(batch, length, -1).copy())

    def close(self) -> None:
        """Free the model."""
        self._free()
        self._lib.llama_model_free(self._model)

    def _free(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        self._context = None

    def _prompt(self, case: Case) -> Tensor:
        return random_prompt(self._dense, case.prompt_tokens, case.new_tokens, case.batch_size, case.depth)

    def _run(self, case: Case) -> tuple[GenerationTime, Tensor, Tensor]:
        """A generation: its times, the logits after the prompt (B, V), and all tokens (B, new_tokens + 1)."""
        prompt, tokens = self._prompt(case).numpy(), []
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        with ExitStack() as stack:
            before, first = (
                stack.enter_context(self._batch(part, start))
                for part, start in ((prompt[:, : case.depth], 0), (prompt[:, case.depth :], case.depth))
            )
            if case.depth:
                self._decode(before)
            start = time.perf_counter()
            logits = self._decode(first)
            prefill = time.perf_counter() - start
            tokens.append(logits.argmax(-1))
            first_logits = torch.from_numpy(logits.copy())
            arrived = [time.perf_counter()]
            step = stack.enter_context(self._batch(tokens[0][:, None], prompt.shape[1]))
            for position in range(case.new_tokens):
                for row, token in enumerate(tokens[-1]):
                    step.token[row], step.pos[row] = token, prompt.shape[1] + position
                tokens.append(self._decode(step).argmax(-1))
                arrived.append(time.perf_counter())
        steps = tuple(after - before for before, after in pairwise(arrived))
        times = GenerationTime(prefill, arrived[0] - start, steps, self._cache_bytes(case))
        return times, first_logits, torch.from_numpy(np.stack(tokens, axis=1))

    @contextmanager
    def _batch(self, tokens: np.ndarray, start: int, every: bool = False) -> Iterator[Any]:
        """Tokens (B, L) from a position on, asking for the logits of the last of each sequence or of every one."""
        length = tokens.shape[1]
        batch = self._lib.llama_batch_init(max(tokens.size, 1), 0, 1)
        batch.n_tokens = tokens.size
        for index, token in enumerate(tokens.flatten()):
            batch.token[index], batch.pos[index] = token, start + index % length
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, index // length
            batch.logits[index] = every or index % length == length - 1
        try:
            yield batch
        finally:
            self._lib.llama_batch_free(batch)

    def _decode(self, batch: Any) -> np.ndarray:
        """The logits (rows, V) that a batch asks for, in memory of llama.cpp."""
        if status := self._lib.llama_decode(self._context, batch):
            raise GraspError(f"llama_decode of {batch.n_tokens} tokens answers {status}; expected 0")
        rows = sum(batch.logits[index] for index in range(batch.n_tokens))
        first = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(first, shape=(rows, self._vocabulary))

    def _cache_bytes(self, case: Case) -> int:
        lib, model = self._lib, self._model
        default = lib.llama_model_n_embd(model) // lib.llama_model_n_head(model)
        family = self._metadata("general.architecture")
        lengths = [self._metadata(f"{family}.attention.{name}_length") for name in ("key", "value")]
        width = lib.llama_model_n_head_kv(model) * sum(int(length or default) for length in lengths)
        positions = case.batch_size * (case.depth + case.prompt_tokens + case.new_tokens)
        return int(positions * lib.llama_model_n_layer(model) * width * _KV_BYTES)

    def _metadata(self, key: str) -> str:
        """A value of the GGUF file, or an empty text."""
        buffer = ctypes.create_string_buffer(128)
        found = self._lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode() if found >= 0 else ""


@contextmanager
def yardsticks(
    names: Sequence[str], dense: PreTrainedModel, progress: Progress = no_progress
) -> Iterator[list[Yardstick]]:
    """Load yardsticks, and free them at the end.

    Args:
        names: ``llama.cpp``, which stands for the weights of ``dense`` in 16 bits (BF16 if it is bf16, else F16)
            and in Q8_0, or GGUF files.
        dense: the dense model, on the CPU.
        progress: called for each.

    Raises:
        ValueError: if a name is anything else, or ``dense`` is not on the CPU.
        MissingPackageError: if llama-cpp-python is not installed.
        GraspError: as ``write_gguf`` and ``Yardstick``.
    """
    if names and dense.device.type != "cpu":
        raise ValueError(f"yardsticks run on the CPU, the models on {dense.device}; give --device cpu")
    with TemporaryDirectory() as folder, ExitStack() as stack:
        files: list[tuple[str, Path, float]] = []
        for name in names:
            if name == LLAMA_CPP:
                half = "BF16" if dense.dtype == torch.bfloat16 else "F16"
                for kind, tolerance in ((half, TOLERANCE[torch.bfloat16]), ("Q8_0", QUANTIZED)):
                    with one_step(progress, f"writing GGUF, {kind}"):
                        write_gguf(dense, path := Path(folder, f"{kind}.gguf"), kind)
                    files.append((f"{LLAMA_CPP}, {kind}", path, tolerance))
            else:
                files.append((f"{LLAMA_CPP}, {Path(name).name}", expanded(name), QUANTIZED))
        loaded = []
        for name, path, tolerance in files:
            loaded.append(Yardstick(name, path, dense, tolerance))
            stack.callback(loaded[-1].close)
        yield loaded


def require_yardsticks(names: Sequence[str]) -> None:
    """Check, before a model is loaded, that llama.cpp is installed and the files are there.

    Raises:
        ValueError, MissingPackageError: as ``yardsticks``.
    """
    for name in names:
        if name != LLAMA_CPP and not (name.lower().endswith(".gguf") and expanded(name).is_file()):
            raise ValueError(f"a yardstick is {LLAMA_CPP} or a GGUF file, got {name!r}; there is no such file")
    files = [Path(name).name for name in names]
    if len(set(files)) < len(files):
        raise ValueError(f"yardsticks need different names to be told apart; got {', '.join(files)}")
    if names:
        load_llama_cpp()


@cache
def load_llama_cpp() -> ModuleType:
    """The package llama_cpp, made silent.

    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingPackageError(
            "a yardstick needs llama.cpp, which is not installed; install it, compiled for this processor, with: "
            "pip install llama-cpp-python"
        ) from error
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    _CALLBACKS.append(silent)
    module: ModuleType = llama_cpp
    return module
