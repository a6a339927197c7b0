"""From a model name and a text to its perplexity, task scores and size."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from grasp.calibration import bos_for, read_pieces, tokenize
from grasp.evaluation.lm_eval import TaskRequest, evaluate_tasks
from grasp.evaluation.perplexity import PerplexityResult, perplexity
from grasp.loading import load_quietly
from grasp.model.quantized_linear import is_quantized
from grasp.model.size import Size, model_size
from grasp.progress import Progress, no_progress
from grasp.workflows.guards import require_known, within_memory
from grasp.workflows.samples import public_model_name, public_text_name


@dataclass(frozen=True)
class Evaluation:
    """The measured quality and size of a model."""

    model: str  # its name; of a path the last part
    text: str | None  # name of the text of ``result``; of a path the last part
    result: PerplexityResult | None  # perplexity on the text
    size: Size  # parameters and bytes
    quantized: bool  # whether a module of the model is
    scores: dict[str, Any] | None = None  # lm-eval's results, see ``evaluate_tasks``

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold; with tasks in lm-eval's format, under the key ``"grasp"``."""
        values = asdict(self)
        scores = values.pop("scores")
        return values if scores is None else {**scores, "grasp": values}


def evaluate(
    name: str,
    source: str | None,
    *,
    tasks: TaskRequest | None = None,
    window: int = 1024,
    stride: int | None = None,
    batch_size: int = 1,
    dtype: str = "auto",
    device: str | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Measure a model: its size, its perplexity on a text, its scores on tasks.

    Args:
        name: as ``load_model`` takes it; ``dtype`` and ``device`` likewise.
        source: text as ``read_pieces`` takes it; ``None`` for no perplexity.
        tasks: the tasks; ``None`` for no scores.
        window: see ``perplexity``; ``stride`` too.
        batch_size: windows, or answers of tasks, per forward pass.
        progress: called as ``progress(step, done, total)``.

    Raises:
        GraspError, ValueError: as ``read_pieces``, ``load_model``, ``perplexity`` and ``evaluate_tasks`` do.
        CalibrationError: if the tokenizer has tokens that the model does not have.
        OutOfMemoryError: if the device has too little memory.
    """
    text = None if source is None else read_pieces(source, split="evaluation")
    if tasks is not None:
        tasks.check(batch_size)
    result = scores = None
    with within_memory(batch_size, window):
        model, tokenizer = load_quietly(name, dtype=dtype, device=device, progress=progress)
        if text is not None:
            tokens = tokenize(tokenizer, text)
            require_known(model, tokens)
            result = perplexity(
                model,
                tokens,
                window=window,
                stride=stride,
                batch_size=batch_size,
                bos_token_id=bos_for(tokenizer),
                progress=progress,
            )
        if tasks is not None:
            scores = evaluate_tasks(
                *(model, tokenizer, tasks.names, tasks.source, tasks.limit), batch_size=batch_size, progress=progress
            )
    text = None if source is None else public_text_name(source)
    return Evaluation(public_model_name(name), text, result, model_size(model), is_quantized(model), scores)
