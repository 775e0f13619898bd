"""Rows of a batch's output, as OpenAI writes them, and what an earlier run left of them."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from specmemo_jax.batch.lines import CHAT, Line, LineError, line_key
from specmemo_jax.errors import RequestError
from specmemo_jax.files.json_lines import row_of
from specmemo_jax.serve.outputs import RequestOutput

_PREFIX = "batch_req_"


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Twelve hex digits of what answers depend on: the model and the run's settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def answer_row(line: Line, output: RequestOutput, model: str, settings: str) -> str:
    """One answered line."""
    answer, chat = output.outputs[0], line.url == CHAT
    request_id = f"{_PREFIX}{settings}_{line.number}"
    said = {"message": {"role": "assistant", "content": answer.text}} if chat else {"text": answer.text}
    prompt, new = len(output.prompt_token_ids), len(answer.token_ids)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{settings}-{line.number}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": answer.finish_reason}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new},
        "system_fingerprint": f"fp_{settings}",
    }
    return _row(line, request_id, 200, body, None)


def error_row(line: Line, error: LineError, settings: str) -> str:
    """One line that cannot be answered, and why."""
    kind = "invalid_request_error" if error.status != 404 else "not_found_error"
    message = f"line {line.number}: {error}"
    body = {"error": {"message": message, "type": kind, "param": None, "code": error.status}}
    said = {"code": kind, "message": message, "line": line.number}
    return _row(line, f"{_PREFIX}{settings}_{line.number}", error.status, body, said)


def _row(line: Line, request_id: str, status: int, body: dict, error: dict | None) -> str:
    response = {"status_code": status, "request_id": request_id, "body": body}
    row = {"id": request_id, "custom_id": line.custom_id, "response": response, "error": error}
    return row_of(row)


def rows_done(path: Path, settings: str) -> set[str]:
    """Keys of the lines that ``path`` holds rows of, after what a kill left of a last row is cut off.

    Raises RequestError, and changes nothing, where a row is none of a batch or was made by other settings.
    """
    done, end = set(), 0
    for number, (raw, row) in enumerate(whole_rows(path), 1):
        found, _, line = str(row.get("id")).removeprefix(_PREFIX).rpartition("_")
        if not found or not (line.isascii() and line.isdigit() and len(line) < 20):
            raise RequestError(f"{path}, line {number}: not a row of a batch; another output works")
        if found != settings:
            raise RequestError(
                f"{path} was written with another model or other settings (fp_{found}, these are "
                f"fp_{settings}): the same again, or another output, works"
            )
        end += len(raw)
        done.add(key_of(row))
    if path.stat().st_size > end:
        os.truncate(path, end)
    return done


def key_of(row: Mapping[str, Any]) -> str:
    """The line that a row answers, as `line_key` names it."""
    return line_key(row.get("custom_id"), int(row["id"].rpartition("_")[2]))


def early_rows(path: Path, settings: str, answered_only: bool) -> dict[str, str]:
    """Rows that a killed run had done before their turn, by their lines' keys; none of other settings."""
    if not path.is_file():
        return {}
    rows_done(path, settings)
    return {
        key_of(row): raw.decode("utf-8")
        for raw, row in whole_rows(path)
        if not (answered_only and row.get("error") is not None)
    }


def drop_errors(path: Path) -> None:
    """Take the rows of errors out of ``path``; at every moment the old file or the new one is there."""
    new = path.with_name(path.name + ".retry")
    with new.open("wb") as file:
        for raw, row in whole_rows(path):
            if row.get("error") is None:
                file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def whole_rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Whole rows; a last one without its line break was being written when the run ended."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            try:
                row = json.loads(raw)
            except (ValueError, RecursionError) as error:
                raise RequestError(
                    f"{path}, line {number}: not a row of a batch ({error}); another output works"
                ) from error
            if not isinstance(row, dict):
                raise RequestError(f"{path}, line {number}: not a row of a batch; another output works")
            yield raw, row
