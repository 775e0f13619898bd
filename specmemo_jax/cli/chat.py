"""``specmemo chat``: a conversation in the terminal, or one turn a line through a pipe."""

import sys

from specmemo_jax.cli import options

EPILOG = '''Examples:

\b
specmemo chat
specmemo chat --temperature 0.7 --max-context 2048 --overflow drop-oldest
printf 'What is a prime?\\nName three.\\n' | specmemo chat --memory-budget 1GiB

/help in a chat lists its commands. """ begins and ends a text of many lines.
'''


def chat(
    system: options.System = None,
    overflow: options.OnOverflow = options.Overflow.error,
    load: options.Load = None,
    model: options.Model = options.DEFAULT_MODEL,
    drafter: options.Drafter = "auto",
    tree_nodes: options.TreeNodes = None,
    max_context: options.MaxContext = None,
    memory_budget: options.MemoryBudget = None,
    dtype: options.NumberFormat = options.Dtype.auto,
    kv_cache_dtype: options.CacheFormat = options.CacheDtype.auto,
    adaptive: options.Adaptive = True,
    temperature: options.Temperature = None,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    max_tokens: options.ChatMaxTokens = None,
) -> None:
    """Talk with a model, turn by turn; what was said stays in its cache, so a turn reads only what is new.

    Answers are written as they come. Standard input may be a pipe: one turn a line, answers on standard
    output. After each answer a line on standard error gives its figures.
    """
    sampling = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "max_tokens": max_tokens,
    }

    from specmemo_jax.cli.sampling import turn_params
    from specmemo_jax.files.prompts import PromptRecord

    ((params,),) = turn_params([PromptRecord(id=1, place="chat")], sampling)

    from specmemo_jax.chat.file import read_chat
    from specmemo_jax.chat.session import ChatSession
    from specmemo_jax.cli.chat_repl import Repl, show_loaded
    from specmemo_jax.files.byte_size import parse_bytes
    from specmemo_jax.llm import LLM

    saved = None if load is None else read_chat(load)
    if sys.stdin is not None and sys.stdin.isatty():
        print(f"loading {model}; what is typed meanwhile is read then", file=sys.stderr, flush=True)
    with LLM(
        model,
        drafter=drafter,
        tree_nodes=tree_nodes,
        memory_budget=memory_budget,
        dtype=dtype.value,
        kv_cache_dtype=kv_cache_dtype.value,
        adaptive=adaptive,
        max_context=max_context,
    ) as llm:
        session = ChatSession(llm, system=system, overflow=overflow.value, sampling_params=params)
        if saved is not None:
            notices = session.load(saved)
            if system is not None:
                session.system = system
            show_loaded(session, notices, saved.path)
        budget = llm.plan.peak_bytes if memory_budget is None else parse_bytes(memory_budget)
        Repl(session, params, budget).run()
