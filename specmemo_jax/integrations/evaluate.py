"""The model under lm-eval (extra ``eval``), so that what an int8 cache or a dtype costs is measured as usual.

import lm_eval
from specmemo_jax.integrations.evaluate import SpecMemoLM

with LLM("smollm2-135m-instruct", kv_cache_dtype="int8", scoring=True) as llm:
    lm_eval.simple_evaluate(model=SpecMemoLM(llm), tasks=["hellaswag"], limit=100)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from specmemo_jax.errors import RequestError
from specmemo_jax.llm import LLM
from specmemo_jax.serve.params import SamplingParams

Pair = tuple[tuple[str, str], list[int], list[int]]
MAX_GEN_TOKENS = 256  # where a task does not say, as lm-eval's own models


class SpecMemoLM(TemplateLM):
    """``llm`` as lm-eval's model; it needs ``scoring=True`` and a tokenizer.

    A context too long for the plan loses its beginning, as with lm-eval's own models. Answers are drafted for
    as the LLM is set up, and are the target's own all the same.
    """

    def __init__(self, llm: LLM):
        super().__init__()
        if llm.tokenizer is None:
            raise RequestError("lm-eval gives texts; a model with a tokenizer would work")
        if not llm.plan.shapes.scoring:
            raise RequestError("lm-eval scores texts; LLM(..., scoring=True) would work")
        self.llm, self.texts = llm, llm.tokenizer

    @property
    def eot_token_id(self) -> int:
        """Ends a text, and stands before one that has no context."""
        return self.llm.eos_ids[0] if self.llm.eos_ids else 0

    @property
    def tokenizer_name(self) -> str:
        """The model's name, for lm-eval's caches."""
        return self.llm.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids as the model's prompts have them; without special tokens where that is asked for."""
        ids = self.texts.encode(string)
        begin = self.texts.bos_token_id
        return ids[1:] if add_special_tokens is False and ids[:1] == [begin] else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's template writes it."""
        ids = self.texts.chat_ids(chat_history)
        return self.texts.decode(ids, skip_special_tokens=False)

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The continuations' log probabilities, and whether each is what greedy decoding would say.

        Requests with the same context follow each other, so that it is read once.
        """
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: requests[i][1])
        for i in tqdm(order, desc="Scoring", disable=disable_tqdm):
            _, context, continuation = requests[i]
            scores, likeliest = self._score(context, continuation)
            found[i] = float(scores.sum()), bool(likeliest.all())
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Whole texts', each token once, in windows of the context."""
        totals = []
        for request in tqdm(requests, desc="Scoring", disable=disable_tqdm):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.llm.plan.context - 1, 1)
            scored = (self._score(*make_disjoint_window(window)) for window in windows)
            totals.append(float(sum(scores.sum() for scores, _ in scored)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string; greedy unless the task asks to sample."""
        prompts, params = [], []
        for request in requests:
            context, asked = request.args[0], request.args[-1]
            until = asked.get("until") or []
            most = asked.get("max_gen_toks", MAX_GEN_TOKENS)
            temperature = asked.get("temperature", 1.0) if asked.get("do_sample") else 0.0
            ids = self.tok_encode(context)
            room = self.llm.plan.context - most
            if room < 1:
                raise RequestError(f"max_gen_toks {most}: the context holds {self.llm.plan.context}")
            prompts.append(ids[-room:])
            stop = [until] if isinstance(until, str) else list(until)
            params.append(
                SamplingParams(
                    temperature=temperature, top_p=asked.get("top_p", 1.0), max_tokens=most, stop=stop
                )
            )
        with tqdm(total=len(prompts), desc="Answering", disable=disable_tqdm) as bar:
            outputs = self.llm.generate(prompts, params, progress=lambda _: bar.update())
        return [output.outputs[0].text for output in outputs]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[np.ndarray, np.ndarray]:
        ids = [*context, *continuation][-self.llm.plan.context :]
        if len(continuation) >= len(ids):
            raise RequestError(
                f"a continuation of {len(continuation)} tokens does not fit the context of "
                f"{self.llm.plan.context}; a larger max_context would work"
            )
        return self.llm.log_likelihoods(ids, len(ids) - len(continuation))
