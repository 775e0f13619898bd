"""Process memory over a long batch job: flat, whatever the number of lines; exit 1 if it grew (Linux only).

    python scripts/check_batch_memory.py                   # 100,000 lines, a tiny model made here
    python scripts/check_batch_memory.py --lines 10000 --unordered

The job is ``specmemo batch`` in a process of its own, 8 rows, lines of 1 to 4 new tokens and one in 50 of
40, with a custom_id each, which a job remembers. A tenth of the lines is taken as the start.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import save_file
from tqdm import tqdm

from specmemo_jax.testing import TINY, tiny_llama, tiny_tokenizer

A_LINE = 256  # bytes, the most that a line may leave behind: its custom_id's place


def make_model(folder: Path) -> None:
    """`specmemo_jax.testing`'s model as files."""
    config = {
        "model_type": "llama", "vocab_size": TINY.vocab_size, "hidden_size": TINY.hidden_size,
        "intermediate_size": TINY.ffn_size, "num_hidden_layers": TINY.num_layers,
        "num_attention_heads": TINY.num_heads, "num_key_value_heads": TINY.num_kv_heads,
        "head_dim": TINY.head_dim, "max_position_embeddings": TINY.max_context,
        "tie_word_embeddings": TINY.tied_embeddings, "rms_norm_eps": TINY.rms_norm_eps,
        "rope_theta": TINY.rope_theta, "hidden_act": "silu", "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {name if name.startswith("lm_head") else f"model.{name}": t for name, t in tiny_llama().items()}
    save_file(tensors, folder / "model.safetensors")
    tiny_tokenizer().fast.save_pretrained(folder)


def make_lines(path: Path, lines: int) -> None:
    """The requests."""
    with path.open("w", encoding="utf-8") as file:
        for n in range(lines):
            body = {
                "prompt": "a b "[: 1 + n % 4] + "no" * (n % 5),
                "max_tokens": 40 if n % 50 == 0 else 1 + n % 4,
            }
            line = {"custom_id": f"request-{n}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def memory_of(process: int) -> int:
    """Bytes of a process that are in memory."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def main() -> int:
    """Run the job and watch it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--unordered", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, tqdm(total=options.lines, disable=None) as bar:
        folder = Path(name)
        requests, results = folder / "in.jsonl", folder / "out.jsonl"
        make_model(folder)
        make_lines(requests, options.lines)
        how = ["--model", str(folder), "--max-batch", "8", "--max-context", "128"]
        how += ["--unordered"] if options.unordered else []
        command = [sys.executable, "-m", "specmemo_jax", "batch", str(requests), str(results), *how]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        found, done, read, began = [], 0, 0, time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            if not results.exists():
                continue
            with results.open("rb") as file:
                file.seek(read)
                new = file.read()
            read, done = read + len(new), done + new.count(b"\n")
            bar.update(done - bar.n)
            if done * 10 // options.lines > len(found):
                try:
                    found.append((done, memory_of(process.pid)))
                except (IndexError, FileNotFoundError):  # it has just ended
                    break
        failed = process.wait()
        rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    for lines, size in found:
        print(f"{lines:>8} lines: {size / 2**20:.1f} MiB")
    good = sum(row["error"] is None for row in rows)
    grew = found[-1][1] - found[0][1]
    per_line = grew / (found[-1][0] - found[0][0])
    print(
        f"{good} of {options.lines} answered in {time.monotonic() - began:.0f} s; grew by "
        f"{grew / 2**20:.1f} MiB, {per_line:.0f} bytes a line"
    )
    return int(failed != 0 or good != options.lines or per_line > A_LINE)


if __name__ == "__main__":
    sys.exit(main())
