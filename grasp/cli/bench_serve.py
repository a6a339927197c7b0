"""``grasp bench serve``."""

from __future__ import annotations

import re
import shlex
from typing import Annotated

import typer

from grasp.cli.arguments import MOST, Dtype, Json, parse_counts
from grasp.cli.bench import Outputs, bench, measure

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="Folders, hub names, [bold]builtin[/bold], or addresses of servers that run, such as http://localhost:8000.",
        show_default=False,
    ),
]
Concurrency = Annotated[str, typer.Option(help="Numbers of requests at a time.")]
Requests = Annotated[int, typer.Option(min=1, max=MOST, help="Requests in a round, for each of those at a time.")]
Tokens = Annotated[int, typer.Option(min=1, max=MOST)]
Rounds = Annotated[int, typer.Option(min=1, max=MOST, help="Turns of every server.")]
Goodput = Annotated[
    str, typer.Option(metavar="ttft:MS,tpot:MS", help="Count requests within these limits; also e2el, end to end.")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|HUB NAME",
        help="Tokenizer of servers that run already; that of the first MODEL served here by default.",
        show_default=False,
    ),
]
VllmOptions = Annotated[str, typer.Option(help='More options of the servers, such as "--max-model-len 1024".')]
TimeLimit = Annotated[
    float, typer.Option(min=0, max=MOST, help="Seconds for the start of a server, and for a round of the client.")
]


@bench.command()
def serve(
    models: Models,
    concurrency: Concurrency = "1,4,16",
    requests: Requests = 5,
    prompt_tokens: Tokens = 128,
    new_tokens: Tokens = 64,
    rounds: Rounds = 3,
    goodput: Goodput = "",
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    vllm_options: VllmOptions = "",
    time_limit: TimeLimit = 900,
    output: Outputs = None,
    as_json: Json = False,
) -> None:
    """Serve each MODEL with vLLM, and run vLLM's benchmark client against the servers in turn.

    The first MODEL is the one that the others are compared with. A server whose log-probabilities are not those of
    transformers is not timed, and the exit code is 1.

    [bold]Examples[/bold]

    [dim]A dense model and a compressed one, with the requests whose first token comes within 200 ms:[/dim]

    $ grasp bench serve builtin small --concurrency 1,4 --goodput ttft:200 -o serve.jsonl

    [dim]Servers that run already:[/dim]

    $ grasp bench serve http://localhost:8000 http://localhost:8001 --tokenizer small
    """
    from grasp.bench import serve as benchmark

    request = benchmark.ServeRequest(
        models=models,
        concurrencies=parse_counts(concurrency, "concurrency"),
        requests=requests,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        limits=parse_limits(goodput),
        dtype=dtype,
        tokenizer=tokenizer,
        server_options=shlex.split(vllm_options),
        time_limit=time_limit,
    )
    measure(lambda progress: benchmark.run(request, progress=progress), output, as_json)


def parse_limits(text: str) -> dict[str, float]:
    """Parse ``"ttft:200,tpot:50"`` as metrics and milliseconds; nothing is no limit.

    Raises:
        ValueError: if the text is anything else.
    """
    limits: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*([a-z0-9]+):([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*", part)
        if match is None:
            raise ValueError(f"goodput must be metrics and milliseconds such as ttft:200,tpot:50; got {text!r}")
        limits[match[1]] = float(match[2])
    return limits
