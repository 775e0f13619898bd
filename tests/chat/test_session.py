"""Chats: ids are appended and never made anew, the cache goes on; what is dropped or made anew is said."""

import copy
import dataclasses
import functools
import json

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core
from transformers import PreTrainedTokenizerFast

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.chat.file import ChatFileError, read_chat
from specmemo_jax.chat.session import ChatSession
from specmemo_jax.chat.turns import (
    Turn,
    answer_ids,
    ids_of,
    keeps_history,
    messages_of,
    next_prompt,
    spoken_ids,
    without_oldest,
)
from specmemo_jax.checkpoints.tokenizer import Tokenizer
from specmemo_jax.errors import CapacityError, ConfigError, RequestError
from specmemo_jax.serve.outputs import CompletionOutput
from specmemo_jax.testing import TINY, tiny_llama

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOL = (  # the default model's: a system prompt of its own where there is none
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are small<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}"
    "{{ '<s>[INST] ' + (system if loop.first else '') + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' </s>' }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
STRIPPING = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
LAST_ONLY = (  # history is rewritten: the system prompt stands before the last question
    "{% for m in messages %}{% if m.role != 'system' %}{% if loop.last %}sys {% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}<|im_start|>assistant\n"
)
STYLES = {"chatml": CHATML, "smol": SMOL, "llama2": LLAMA2, "llama3": LLAMA3}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|begin_of_text|>"]
SPECIALS += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CONFIG = dataclasses.replace(TINY, vocab_size=272)


@functools.cache
def tokenizer(template: str) -> Tokenizer:
    """Bytes and a few merges."""
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "t"), ("Ġt", "he"), ("]", "Ġ")]
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    core = Core(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    fast.chat_template = template
    return Tokenizer(fast)


@functools.cache
def llm() -> LLM:
    made = LLM(CONFIG, tiny_llama(CONFIG), drafter="ngram", max_context=200)
    made.tokenizer = tokenizer(CHATML)
    return made


def params(**fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **fields})


SAYINGS = ["hello the", "all", "the hell 12", "é\n the", "x"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("system", [None, "be the hell"])
def test_appended_ids_are_those_of_a_whole_rendering(style, system):
    known = tokenizer(STYLES[style])
    lead = " " if style == "llama2" else ""  # which that model says itself
    turns: tuple[Turn, ...] = ()
    for number, text in enumerate(SAYINGS):
        prompt, whole = next_prompt(known, system, turns, text)
        assert whole == (number == 0)
        assert ids_of(turns) * (not whole) + list(prompt) == known.chat_ids(messages_of(system, turns, text))
        answer = SAYINGS[-1 - number]
        ids = answer_ids(known, messages_of(system, turns, text), answer)
        assert known.decode(ids) == lead + answer
        turns = (*turns, Turn(text, answer, prompt, ids, whole))
    fewer = without_oldest(known, system, turns, 2)
    assert [turn.answer_ids for turn in fewer] == [turn.answer_ids for turn in turns[2:]]
    whole = known.chat_ids(messages_of(system, fewer, "more"))
    assert [*ids_of(fewer), *next_prompt(known, system, fewer, "more")[0]] == whole


@pytest.mark.parametrize("template", [STRIPPING, LAST_ONLY])
def test_templates_that_rewrite_history_are_rendered_whole(template):
    known = tokenizer(template)
    turn = Turn("ask", "<think>the</think>hello", (1,), (2,), True)
    messages = messages_of(None, [turn], "more")
    assert not keeps_history(known, messages)
    assert next_prompt(known, None, [turn], "more") == (tuple(known.chat_ids(messages)), True)
    plain = messages_of(None, [dataclasses.replace(turn, answer=" hello ")], "more")
    assert keeps_history(known, plain) == (template is STRIPPING)


@pytest.mark.parametrize(
    ("ids", "text", "reason", "stopped_at", "kept"),
    [
        ("hello<|im_end|>", "hello", "stop", None, "hello"),
        ("hello", "hello", "length", None, "hello"),
        ("hello", "hello", "abort", None, "hello"),
        ("hello the", "hello t", "stop", "he", "hello t"),  # inside the token " the"
        ("hell", "", "stop", "h", ""),
        ("<|im_end|>", "", "stop", None, ""),
    ],
)
def test_what_an_answer_says(ids, text, reason, stopped_at, kept):
    known = tokenizer(CHATML)
    generated = tuple(known._plain_ids(ids))
    completion = CompletionOutput(0, text, generated, reason, stopped_at)
    said = spoken_ids(known, completion, (2,), True)
    assert known.decode(said, skip_special_tokens=False) == kept
    shared = len(known._plain_ids(kept)) - 1
    assert said[:shared] == generated[:shared]


def test_a_turn_prefills_what_is_new_and_answers_as_if_all_were_read():
    session = ChatSession(llm(), system="be", sampling_params=params(max_tokens=12))
    outputs, cached = [], []

    def run(stream):
        for _ in stream:
            pass
        output = stream.output
        assert output is not None
        prompt = list(output.prompt_token_ids)
        common = next((i for i, (a, b) in enumerate(zip(cached, prompt, strict=False)) if a != b), None)
        common = min(len(cached), len(prompt) - 1) if common is None else common
        assert session.stats.last_prefilled == len(prompt) - common
        assert session.ids[: len(prompt)] == prompt
        cached[:] = [*prompt, *output.outputs[0].token_ids][:-1]
        outputs.append((output, stream.job.params))
        return output.outputs[0]

    stop = run(session.send("hello")).token_ids[4]
    before = session.stats.prefilled_tokens
    assert run(session.send("the", params(stop_token_ids=[stop]))).finish_reason in ("stop", "length")
    assert session.stats.prefilled_tokens - before < 40
    run(session.send("all 12", params(temperature=1.0, seed=5, max_tokens=12)))
    session.undo()
    interrupted = session.send("other", params(max_tokens=30))
    interrupted.stop()  # as a signal handler does: after the step that runs
    run(interrupted)
    assert outputs[-1][0].outputs[0].finish_reason == "abort"
    assert session.messages[-1]["content"] == outputs[-1][0].outputs[0].text
    run(session.retry(params(temperature=1.0, seed=6)))
    run(session.send("end", params(repetition_penalty=1.3)))
    assert [message["content"] for message in session.messages[::2]] == ["be"] + [
        turn.answer for turn in session.turns
    ]
    assert session.stats.turns == 4
    assert session.stats.answers == 6
    assert session.stats.prefilled_tokens < session.stats.prompt_tokens / 2
    assert session.stats.full_renders == 0

    prompts = [list(output.prompt_token_ids) for output, _ in outputs]
    for (output, how), fresh in zip(outputs, llm().generate(prompts, [p for _, p in outputs]), strict=True):
        if output.finished:
            assert fresh.outputs[0] == output.outputs[0], how
        else:
            said = output.outputs[0].token_ids
            assert fresh.outputs[0].token_ids[: len(said)] == said


def test_an_answer_that_is_left_stays_as_far_as_it_came():
    session = ChatSession(llm(), sampling_params=params(max_tokens=30))
    with pytest.raises(RequestError, match="nothing was asked"):
        session.undo()
    with session.send("hello"):
        pass  # left before it began
    assert session.messages == []
    with session.send("hello") as stream:
        shown = next(stream)
        with pytest.raises(RequestError, match="still being written"):
            session.send("the")
        with pytest.raises(RequestError, match="still being written"):
            session.undo()
    assert session.messages[1]["content"].startswith(shown)
    assert session.turns[-1].finish_reason == "abort"
    with session.retry() as stream:
        pass
    assert session.turns[-1].finish_reason == "abort"  # the answer before stays until there is another
    session.ask("all")
    assert session.turns[0].finish_reason == "abort"
    assert session.turns[1].finish_reason == "length"
    assert session.undo().user == "all"
    session.clear()
    assert session.messages == []


def test_an_interrupt_inside_a_step_keeps_the_chat(monkeypatch):
    session = ChatSession(llm(), sampling_params=params(max_tokens=30))
    want = session.ask("hello").outputs[0]
    session.clear()
    stream, burst, calls = session.send("hello"), llm().engine.burst, []

    def interrupted(steps, waiting):
        calls.append(steps)
        if len(calls) == 3:
            raise KeyboardInterrupt
        burst(steps, waiting)

    monkeypatch.setattr(llm().engine, "burst", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    monkeypatch.undo()
    said = session.turns[-1]
    assert said.finish_reason == "abort"
    assert 0 < len(said.answer_ids) < 30
    assert said.answer_ids == want.token_ids[: len(said.answer_ids)]
    prompt = [
        *session.ids,
        *session.tokenizer.next_turn_ids([*session.messages, {"role": "user", "content": "x"}]),
    ]
    output = session.ask("x")
    assert list(output.prompt_token_ids) == prompt
    assert session.stats.last_prefilled == len(prompt)  # the cache was lost


def test_a_full_context_is_an_error_with_the_numbers():
    session = ChatSession(llm(), system="be", sampling_params=params(max_tokens=20))
    for text in ("one", "two"):
        session.ask(text)
    before = session.messages
    with pytest.raises(
        CapacityError, match=r"context of 200 .* needs room for 20, \d+ too many.*drop-oldest"
    ) as caught:
        session.send("x" * 80)
    assert str(len(session.ids)) in str(caught.value)
    with pytest.raises(CapacityError, match="room for 150"):
        session.send("x", params(max_tokens=150))
    assert session.messages == before
    session.ask("three")
    assert session.stats.dropped_turns == 0


def test_the_oldest_turns_make_room_when_asked():
    session = ChatSession(llm(), system="be", overflow="drop-oldest", sampling_params=params(max_tokens=20))
    for text in ("one", "two"):
        session.ask(text)
    answers = {turn.user: turn.answer_ids for turn in session.turns}
    stream = session.send("x" * 70)
    assert [turn.user for turn in stream.dropped] == ["one"]
    assert [turn.user for turn in session.turns] == ["one", "two"]
    list(stream)
    assert [turn.user for turn in session.turns] == ["two", "x" * 70]
    assert session.messages[0] == {"role": "system", "content": "be"}
    assert session.turns[0].answer_ids == answers["two"]
    assert session.stats.dropped_turns == 1
    assert stream.output is not None
    fresh = llm().generate([list(stream.output.prompt_token_ids)], params(max_tokens=20))[0]
    assert fresh.outputs[0].token_ids == stream.output.outputs[0].token_ids
    with pytest.raises(CapacityError, match="all 2 turns dropped"):
        session.send("x" * 190)
    assert session.stats.turns == 2


def test_an_answer_without_max_tokens_ends_with_the_context():
    session = ChatSession(llm(), sampling_params=params(max_tokens=None, ignore_eos=True))
    output = session.ask("x" * 100)
    assert output.outputs[0].finish_reason == "length"
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 200
    with pytest.raises(CapacityError, match="room for 50"):  # a quarter of the context
        session.send("x")


def test_the_system_prompt_can_change():
    session = ChatSession(llm(), sampling_params=params())
    session.ask("one")
    ids = session.turns[0].answer_ids
    session.system = "the hell"
    assert session.turns[0].answer_ids == ids
    assert list(session.turns[0].prompt_ids) == session.tokenizer.chat_ids(session.messages[:2])
    session.ask("two")
    assert session.messages[0]["content"] == "the hell"
    session.system = None
    assert session.messages[0]["role"] == "user"


def test_what_a_template_does_not_take_is_refused_at_once():
    silent = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    for template, match in (
        (silent, "does not show a system prompt"),
        ("{{ raise_exception('no') }}", "refuses"),
    ):
        with pytest.raises(RequestError, match=match):
            ChatSession(wearing(template), system="be")
    with pytest.raises(RequestError, match="no chat template"):
        ChatSession(wearing(None))
    with pytest.raises(ConfigError, match="'cut' is not one of error, drop-oldest"):
        ChatSession(llm(), overflow="cut")  # type: ignore[arg-type]
    for text in ("", " \n", "\ud800"):
        with pytest.raises(RequestError):
            ChatSession(llm()).send(text)


def test_a_template_that_rewrites_history_is_answered_and_counted():
    session = ChatSession(wearing(LAST_ONLY), sampling_params=params())
    session.ask("one")
    session.ask("two")
    assert session.stats.full_renders == 1
    assert list(session.turns[1].prompt_ids) == session.tokenizer.chat_ids(session.messages[:3])


def wearing(template) -> LLM:
    """The model with another template."""
    other = copy.copy(llm())
    other.tokenizer = tokenizer(template)
    return other


@pytest.fixture
def talked():
    session = ChatSession(llm(), system="be", sampling_params=params(temperature=1.0, seed=1))
    for text in ("hello é", "the"):
        session.ask(text)
    return session


def test_a_saved_chat_goes_on_with_the_same_ids(talked, tmp_path):
    file = tmp_path / "chat.json"
    talked.save(file)
    document = json.loads(file.read_text(encoding="utf-8"))
    assert [{"role": m["role"], "content": m["content"]} for m in document["messages"]] == talked.messages
    assert document["messages"][2]["token_ids"] == list(talked.turns[0].answer_ids)
    other = ChatSession(llm())
    assert other.load(file) == []
    assert (other.ids, other.turns, other.system) == (talked.ids, talked.turns, "be")
    other.undo()
    other.save(file)  # a saved chat is replaced
    assert len(read_chat(file).turns) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


def test_chats_that_changed_or_are_another_models_are_tokenised_with_a_notice(talked, tmp_path):
    file = tmp_path / "chat.json"
    talked.save(file)
    document = json.loads(file.read_text(encoding="utf-8"))

    def loaded(**changes):
        file.write_text(json.dumps({**document, **changes}))
        session = ChatSession(llm(), sampling_params=params())
        return session, session.load(file)

    session, notices = loaded(model="other/model")
    assert [notice.split(" and ")[0] for notice in notices] == ["the chat was held with other/model"]
    assert session.ids == talked.ids
    session, notices = loaded(vocabulary="another")
    assert "2 of 2 answers were tokenised anew (another vocabulary)" in notices
    assert session.messages == talked.messages
    session.ask("x")
    messages = json.loads(json.dumps(document["messages"]))
    messages[1]["content"], messages[4]["content"] = "other", "all the"
    session, notices = loaded(messages=messages)
    assert notices[0].startswith("1 of 2 answers were tokenised anew")
    assert notices[1].startswith("1 of 2 questions are put otherwise")
    assert session.turns[1].answer_ids == tuple(session.tokenizer._plain_ids("all the"))
    bare = [{"role": m["role"], "content": m["content"]} for m in document["messages"]]
    session, notices = loaded(messages=bare)
    assert session.messages == bare
    assert "token ids are missing" in notices[0]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "cannot read"),
        ("{", "damaged or no JSON"),
        ("[" * 100_000, "damaged or no JSON"),
        ("[]", "not a saved chat"),
        ('{"format": "specmemo-chat", "version": 2}', "version 2"),
        ('{"format": "specmemo-chat", "version": 1, "messages": 1}', "no list"),
        ('{"format": "specmemo-chat", "version": 1, "messages": [1]}', "message 1 has no"),
        (
            '{"format": "specmemo-chat", "version": 1, "messages": [{"role": "user", "content": "a"}]}',
            "in turn",
        ),
        (
            '{"format": "specmemo-chat", "version": 1, "messages": [{"role": "user", "content": "\\ud800"}]}',
            "a text",
        ),
        (
            '{"format": "specmemo-chat", "version": 1, "messages": '
            '[{"role": "user", "content": "a", "token_ids": [-1]}]}',
            "list of token ids",
        ),
    ],
)
def test_files_that_are_no_chats_are_refused(talked, tmp_path, text, match):
    file, before = tmp_path / "chat.json", talked.messages
    if text is not None:
        file.write_text(text)
    with pytest.raises(ChatFileError, match=match):
        talked.load(file)
    assert talked.messages == before
    if text is not None:
        with pytest.raises(ChatFileError, match="exists and is not a saved chat"):
            talked.save(file)
        assert file.read_text() == text
    with pytest.raises(ChatFileError, match="cannot write"):
        talked.save(tmp_path / "none" / "chat.json")


def test_memory_is_weights_and_what_the_engine_holds():
    session = ChatSession(llm(), sampling_params=params())
    session.ask("one")
    engine, plan = llm().engine, llm().plan
    state = engine.take_state()
    import jax

    live = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert session.stats.memory_bytes == plan.weights_bytes  # the engine has let its state go
    session.ask("two")
    assert session.stats.memory_bytes == plan.weights_bytes + live
    assert session.stats.memory_bytes <= session.stats.planned_bytes
