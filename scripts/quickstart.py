"""Set up .venv if needed, fetch the default model, and answer a few prompts with and without speculation.

Exits with 1 unless both give the same token ids.
"""

import argparse
import sys
from pathlib import Path

from _bootstrap import enter

PROMPTS = Path(__file__).parent / "data" / "quickstart_prompts.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a zoo name, folder or .gguf file")
    parser.add_argument("--prompts", default=PROMPTS, help="JSONL, as for `specmemo generate`")
    parser.add_argument("--max-tokens", type=int, default=96, help="most new tokens an answer")
    parser.add_argument("--max-context", type=int, default=1024, help="most tokens of prompt and answer")
    parser.add_argument("--tree-nodes", type=int, help="tokens proposed a step, root included")
    parser.add_argument(
        "--extra",
        action="append",
        default=[],
        choices=("cuda12", "cuda13", "rocm"),
        help="for a GPU",
    )
    options = parser.parse_args()
    enter(extras=tuple(options.extra))

    from specmemo_jax.cli.failures import INTERRUPTED, describe, quiet_libraries

    quiet_libraries()
    try:
        from quickstart_job import compare

        return 0 if compare(options) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 (the last stop before the user)
        print(f"quickstart: error: {describe(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
