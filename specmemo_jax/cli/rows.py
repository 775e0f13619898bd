"""One answer as a JSON object, or as text for a reader."""

from typing import Any

from specmemo_jax.cli.answers import Answer
from specmemo_jax.files.prompts import PromptRecord
from specmemo_jax.serve.outputs import RequestOutput


def row(answer: Answer) -> dict[str, Any]:
    """One answer as a JSON object; times in seconds. ``seed`` is None for greedy answers."""
    record, output = answer.record, answer.output
    completion, metrics = output.outputs[0], output.metrics
    return {
        "id": record.id,
        "line": record.line,
        **record.labels,
        "turn": answer.turn,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "seed": None if answer.params.is_greedy else answer.params.seed,
        "prompt_tokens": len(output.prompt_token_ids),
        "steps": metrics.steps,
        "accepted_lengths": list(metrics.accepted_lengths),
        "mean_accepted_length": round(metrics.mean_accepted_length, 4),
        "tokens_per_second": round(metrics.tokens_per_second, 3),
        "time_to_first_token_s": round(metrics.time_to_first_token_s, 6),
    }


def as_text(answer: Answer, *, headed: bool) -> str:
    """Heading, answer and figures, as `streaming` writes them piece by piece."""
    text = answer.output.outputs[0].text.strip()
    return heading(answer.record, answer.turn, headed) + text + "\n" + figures(answer.output)


def heading(record: PromptRecord, turn: int, headed: bool) -> str:
    """The line above an answer, where there is more than one; ``headed``: where there is another prompt."""
    if record.num_turns > 1:
        return f"--- {record.id}, turn {turn}\n"
    return f"--- {record.id}\n" if headed else ""


def figures(output: RequestOutput) -> str:
    """The line below an answer."""
    completion, metrics = output.outputs[0], output.metrics
    return (
        f"[{len(completion.token_ids)} tokens, {completion.finish_reason}; "
        f"{metrics.tokens_per_second:.1f} tokens/s, {metrics.mean_accepted_length:.2f} tokens a step]\n"
    )
