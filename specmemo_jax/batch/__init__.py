"""Offline batches: a file of requests in, a file of answers out, and nothing lost between two runs."""

from specmemo_jax.batch.run import BatchSummary, request_tokens, run_batch

__all__ = ["BatchSummary", "request_tokens", "run_batch"]
