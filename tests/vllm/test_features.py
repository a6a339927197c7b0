"""vLLM's features with compressed models: adapters, prefix caching and chunked prefill of one server, and drafts."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from grasp.bench.servers import COMMAND, Process, Server, fetch, free_port, start
from grasp.method.storage import Storage
from grasp.peft import lowrank_targets
from tests.tiny_tokenizers import byte_tokenizer
from tests.vllm.engines import NEW_TOKENS, RANKS, TIMEOUT, greedy, load, save_compressed, vllm_environment

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # peft warns of every custom module
]

BLOCK, STEP = 32, 64  # tokens of a block of the cache, and of all requests in one step
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(2**26), "--max-num-seqs", "8"]
SHAPE = {"max_position_embeddings": 512, "vocab_size": len(byte_tokenizer())}
PREFIX = torch.randint(3, 200, (5 * BLOCK + 7,), generator=torch.Generator().manual_seed(0)).tolist()
PROMPTS = [PREFIX + [token] * 5 for token in (20, 70, 120)]


@contextmanager
def served(folder: Path, log: Path, *options: str) -> Iterator[Server]:
    """A server of a checkpoint."""
    port, name = free_port(), folder.name
    command = [*COMMAND, "--model", str(folder), "--served-model-name", name, "--port", str(port), *OPTIONS, *options]
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in vllm_environment().items():
            patch.setenv(variable, value)
        with Process(command, log, offline=True) as process:
            yield start(process, name, f"http://127.0.0.1:{port}", TIMEOUT)


def tokens(server: Server, prompts: Sequence[Sequence[int]], model: str = "") -> list[list[int]]:
    """A model's greedy tokens for each prompt, one request after the other."""
    asked = {"model": model or server.model, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    asked["return_token_ids"] = True
    answers = (fetch(f"{server.url}/v1/completions", {**asked, "prompt": prompt}) for prompt in prompts)
    return [answer["choices"][0]["token_ids"] for answer in answers]


def metric(server: Server, name: str) -> float:
    """A counter of the server."""
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        (line,) = [line for line in answer.read().decode().splitlines() if line.startswith(f"vllm:{name}{{")]
    return float(line.rpartition(" ")[2])


# --- adapters, cached prefixes and chunks -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the compressed ``small`` and, of peft, an ``adapter`` of low-rank and dense linears."""
    path = tmp_path_factory.mktemp("adapted")
    save_compressed(path / "small", "llama", **SHAPE)
    byte_tokenizer().save_pretrained(path / "small")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(load(path / "small"), lowrank_targets(config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # peft initialises it to 0
            parameter.data.normal_(std=0.2)
    model.save_pretrained(path / "adapter")
    return path


@pytest.fixture(scope="module")
def expected(adapted: Path) -> dict[str, list[list[int]]]:
    """transformers' tokens without and, by peft, with the adapter."""
    plain = greedy(load(adapted / "small"), PROMPTS)
    config = lowrank_targets(LoraConfig.from_pretrained(adapted / "adapter"))
    model = PeftModel.from_pretrained(load(adapted / "small"), adapted / "adapter", config=config)
    with_adapter = greedy(model, PROMPTS)
    assert all(with_adapter[i] != plain[i] for i in range(len(PROMPTS)))
    return {"small": plain, "adapter": with_adapter}


@pytest.fixture(scope="module")
def server(adapted: Path) -> Iterator[Server]:
    lora = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"adapter={adapted / 'adapter'}"]
    steps = ["--max-num-batched-tokens", str(STEP), "--enable-chunked-prefill"]
    cache = ["--enable-prefix-caching", "--block-size", str(BLOCK)]
    with served(adapted / "small", adapted / "server.log", *lora, *steps, *cache) as running:
        yield running


@pytest.mark.parametrize("model", ["small", "adapter"])
def test_prompts_in_chunks_with_cached_prefixes_give_the_tokens_of_transformers(
    model: str, server: Server, expected: dict[str, list[list[int]]]
) -> None:
    """Neither finds the prefix of the other in the cache, and each finds its own, whole blocks of it.

    vLLM takes prompts that are longer than a step only in chunks.
    """
    assert len(PREFIX) > 2 * STEP
    hits = metric(server, "prefix_cache_hits_total")
    assert tokens(server, PROMPTS[:1], model) == expected[model][:1]
    assert metric(server, "prefix_cache_hits_total") == hits
    assert tokens(server, PROMPTS[1:], model) == expected[model][1:]
    assert metric(server, "prefix_cache_hits_total") == hits + (len(PROMPTS) - 1) * (len(PREFIX) // BLOCK * BLOCK)


# --- a compressed draft of the same model -----------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [None, Storage(8)])
def test_a_compressed_draft_is_accepted_and_the_tokens_are_those_of_the_dense_model(
    storage: Storage | None, tmp_path: Path
) -> None:
    """The linears keep nearly all of their ranks, so that a random model accepts some of the draft's tokens."""
    dense = save_compressed(tmp_path / "dense", "llama", {}, **SHAPE)
    byte_tokenizer().save_pretrained(dense)
    save_compressed(tmp_path / "draft", "llama", dict.fromkeys(RANKS["llama"], 30), storage=storage, **SHAPE)
    settings = f'{{"method": "draft_model", "model": "{tmp_path / "draft"}", "num_speculative_tokens": 3}}'
    with served(dense, tmp_path / "server.log", "--speculative-config", settings) as server:
        assert tokens(server, PROMPTS) == greedy(load(dense), PROMPTS)
        proposed = metric(server, "spec_decode_num_draft_tokens_total")
        accepted = metric(server, "spec_decode_num_accepted_tokens_total")
    assert 0.2 * proposed < accepted < proposed
