"""scripts/examples on a tiny chat model: each runs, says what it promises, and survives its users."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.kv import Groups
from specmemo_jax.testing import tiny_llama

EXAMPLES = Path(__file__).parent.parent / "scripts" / "examples"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": 1,
}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with random weights whose tokens are bytes; its greedy answers never end by themselves."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = tiny_llama(LlamaConfig.from_dict(CONFIG))
    tensors["lm_head.weight"][:2] = 0
    named = {name if name.startswith("lm_head") else f"model.{name}": x for name, x in tensors.items()}
    save_file(named, folder / "model.safetensors")
    tokens = ["<start>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in tokens[:2]])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(str(folder))
    return str(folder)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_examples_are_tested_and_say_how_to_run_them():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"generate", "stream", "chat_loop", "sampling", "custom_drafter", "ray_batch"}
    for name in names:
        assert f"python scripts/examples/{name}.py" in (EXAMPLES / f"{name}.py").read_text()


def test_generate(model, capsys):
    module = example("generate")
    module.main(["--model", model, "--max-tokens", "9"])
    out = capsys.readouterr().out
    assert "target KV" in out
    assert "generation memory" in out
    assert all(f"> {question}\n" in out for question in module.QUESTIONS)
    assert out.count(" a step; ") == 4


def test_stream(model, capsys):
    example("stream").main(["--model", model, "--max-tokens", "60"])
    chat, text, left = capsys.readouterr().out.split("-- ")[1:]
    assert "[length; 60 tokens" in chat
    assert "[stop at " in text or "[length; 60 tokens" in text
    assert "[abort; " in left


def test_a_stream_is_interrupted_and_the_next_one_starts(model, capsys, monkeypatch):
    module = example("stream")
    interrupt_print(module, monkeypatch, after=3)
    module.main(["--model", model, "--max-tokens", "60"])
    chat, text, _ = capsys.readouterr().out.split("-- ")[1:]
    assert "[abort; " in chat
    assert "[abort; " not in text


def test_sampling(model, capsys):
    example("sampling").main(["--model", model, "--max-tokens", "9", "--drafters", "none", "ngram"])
    out = capsys.readouterr().out
    assert "temperature 0.7, seed 2:" in out
    assert "\nngram    " in out
    assert "A seed gives the same answer each time" in out


def test_custom_drafter(model, capsys):
    example("custom_drafter").main(["--model", model, "--max-tokens", "40"])
    out = capsys.readouterr().out
    assert "\nbigram " in out
    assert "\nngram " in out
    assert "Token ids equal plain decoding's" in out


def test_the_bigram_table_learns_row_by_row():
    drafter = example("custom_drafter").BigramTable(vocab_size=20, num_nodes=4)
    jitted_observe, jitted_propose = jax.jit(drafter.observe), jax.jit(drafter.propose)

    def observe(state, *arrays):
        return jitted_observe(None, state, *(np.asarray(x, np.int32) for x in arrays))

    def chains(state, pending):
        tree, _ = jitted_propose(None, state, np.asarray(pending, np.int32), np.zeros(2, np.int32))
        assert tree.parents.tolist() == [[0, 0, 1, 2]] * 2
        assert tree.depths.tolist() == [[0, 1, 2, 3]] * 2
        return tree.tokens.tolist()

    state = observe(drafter.init(Groups.of(2, 64)), [1], [[5, 6, 7, 9]], [0], [3])  # 9 is padding
    assert chains(state, [5, 5]) == [[5, -1, -1, -1], [5, 6, 7, -1]]
    state = observe(state, [0, 1], [[8, 8], [5, 8]], [0, 3], [0, 2])  # row 0 is empty
    assert chains(state, [8, 6]) == [[8, -1, -1, -1], [6, 7, 5, 8]]
    state = observe(state, [1], [[6, 8]], [0], [2])  # a new request in row 1
    assert chains(state, [5, 6]) == [[5, -1, -1, -1], [6, 8, -1, -1]]


def test_chat_loop(model, capsys, monkeypatch):
    module = example("chat_loop")
    sessions = watch(module, monkeypatch)
    say(monkeypatch, "Hello", "", "And now?", "/retry", "/reset", "Again")
    module.main(["--model", model, "--max-tokens", "9", "--max-context", "256"])
    out = capsys.readouterr().out
    (session,) = sessions
    assert [turn.user for turn in session.turns] == ["Again"]
    assert session.turns[0].answer in out
    assert session.stats.answers == 4
    assert session.stats.prefilled_tokens < session.stats.prompt_tokens
    assert out.count("[cut: --max-tokens") == 4
    assert "[a new conversation]" in out


def test_chat_loop_says_when_the_context_is_full(model, capsys, monkeypatch):
    module = example("chat_loop")
    sessions = watch(module, monkeypatch)
    say(monkeypatch, "Hi", "x" * 60, "Ho")
    module.main(["--model", model, "--max-tokens", "9", "--max-context", "80"])
    out = capsys.readouterr().out
    assert out.count("[not answered: ") == 1
    assert "the context of 80 tokens is full" in out
    assert "/reset starts a new conversation" in out
    assert [turn.user for turn in sessions[0].turns] == ["Hi", "Ho"]  # what was not answered is not kept


def test_chat_loop_keeps_what_was_said_before_an_interrupt(model, capsys, monkeypatch):
    module = example("chat_loop")
    sessions = watch(module, monkeypatch)
    interrupt_print(module, monkeypatch, after=3)
    say(monkeypatch, "Hello", "More", KeyboardInterrupt)
    module.main(["--model", model, "--max-tokens", "40", "--max-context", "256"])
    out = capsys.readouterr().out
    assert " [stopped]" in out
    first, second = sessions[0].turns
    assert first.finish_reason == "abort"
    assert first.answer
    assert second.finish_reason == "length"
    assert sessions[0].stats.last_prefilled <= len(second.prompt_ids) + 1


def say(monkeypatch, *lines) -> None:
    """What the user types, then the end of the input; an exception among the lines is raised."""
    left = list(lines)

    def read(prompt: str) -> str:
        line = left.pop(0) if left else EOFError
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def watch(module, monkeypatch) -> list:
    """Every session that the example opens."""
    sessions = []

    class Watched(module.ChatSession):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            sessions.append(self)

    monkeypatch.setattr(module, "ChatSession", Watched)
    return sessions


def interrupt_print(module, monkeypatch, after: int) -> None:
    """Ctrl-C while the given piece is written, once."""
    pieces = []

    def interrupted(*values, **options):
        if options.get("flush"):
            pieces.append(values)
            if len(pieces) == after:
                raise KeyboardInterrupt
        print(*values, **options)

    monkeypatch.setattr(module, "print", interrupted, raising=False)
