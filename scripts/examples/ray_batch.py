"""A file of requests over a Ray cluster, or over this machine: every worker has the model.

pip install "specmemo-jax[ray]"
python scripts/examples/ray_batch.py requests.jsonl answers --workers 2
"""

import argparse

from specmemo_jax.integrations.ray_data import Answers


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("requests", help='JSONL: {"prompt": ...} or {"messages": ...} a line')
    parser.add_argument("answers", help="folder for the answers, JSONL")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--max-tokens", type=int, default=64, help="most new tokens an answer")
    parser.add_argument("--max-batch", type=int, default=8, help="rows decoded together by a worker")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    options = parser.parse_args(argv)

    import ray.data

    answered = ray.data.read_json(options.requests).map_batches(
        Answers,
        fn_constructor_kwargs={
            "model": options.model,
            "max_batch": options.max_batch,
            "max_tokens": options.max_tokens,
        },
        batch_size=8 * options.max_batch,  # so that a long answer leaves few rows idle
        concurrency=options.workers,
        num_gpus=options.gpus,
    )
    answered.write_json(options.answers)
    print(f"{options.answers} has the answers")


if __name__ == "__main__":
    main()
