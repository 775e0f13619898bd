"""Threads on one model, its end, and forks: one call at a time, and never a hang."""

import gc
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from specmemo_jax import LLM, ChatSession, SamplingParams
from specmemo_jax.draft import NgramDrafter
from specmemo_jax.errors import ClosedError, RequestError
from specmemo_jax.serve.turn import Turn
from specmemo_jax.testing import TINY, tiny_llama

GREEDY = SamplingParams(temperature=0, max_tokens=12)
SECONDS = 60


@pytest.fixture(scope="module")
def model(tiny_model):
    with LLM(tiny_model, max_context=96, max_batch=2, drafter=NgramDrafter(4), scoring=True) as llm:
        yield llm


def new_llm():
    return LLM(TINY, tiny_llama(), max_context=64, drafter=None)


def calls(llm, folder):
    """Every kind of call, each as a function of its number that gives what it said."""

    def generate(n):
        return [o.outputs[0].text for o in llm.generate([f"ab{n}", "ba"], GREEDY)]

    def chat(n):
        return llm.chat([{"role": "user", "content": f"q{n}"}], GREEDY)[0].outputs[0].text

    def stream(n):
        with llm.stream(f"abc{n}", GREEDY) as pieces:
            return "".join(pieces)

    def left_early(n):
        with llm.stream(f"abd{n}", GREEDY) as pieces:
            return next(pieces, "")

    def session(n):
        talk = ChatSession(llm, sampling_params=GREEDY)
        return [talk.ask(f"one {n}").outputs[0].text, talk.ask("two").outputs[0].text]

    def score(n):
        return llm.log_likelihoods([5 + n, 6, 7, 8])[0].tolist()

    def batch(n):
        source, out = folder / f"in{n}.jsonl", folder / f"out{n}-{threading.get_ident()}.jsonl"
        source.write_text(f'{{"prompt": "x{n}"}}\n' * 3)
        llm.run_batch(source, out, sampling_params=GREEDY)
        rows = out.read_text().count("\n")
        out.unlink()
        return rows

    return [generate, chat, stream, left_early, session, score, batch]


def test_llm_calls_from_eight_threads_say_what_they_say_alone(model, tmp_path):
    kinds = calls(model, tmp_path)
    asked = [(kind, n) for n in range(4) for kind in kinds]
    alone = [kind(n) for kind, n in asked]
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(kind, n) for kind, n in asked]
        assert [future.result(SECONDS) for future in futures] == alone


def test_llm_second_call_in_a_stream_s_own_thread_is_refused(model):
    stream = model.stream("abc", GREEDY)
    next(stream)
    for call in (lambda: model.generate("a", GREEDY), lambda: next(model.stream("b", GREEDY))):
        with pytest.raises(RequestError, match="closing its stream"):
            call()
    with pytest.raises(RequestError, match="closing its stream"):
        model.log_likelihoods([1, 2, 3])
    stream.close()
    assert model.generate("a", GREEDY)[0].finished


def test_llm_call_in_another_thread_waits_for_a_stream(model):
    stream = model.stream("abc", GREEDY)
    first, done = next(stream), threading.Event()
    thread = threading.Thread(target=lambda: (model.generate("a", GREEDY), done.set()))
    thread.start()
    assert not done.wait(0.2)
    rest = "".join(stream)
    assert done.wait(SECONDS)
    thread.join(SECONDS)
    assert first + rest == model.generate("abc", GREEDY)[0].outputs[0].text


def test_llm_stream_that_is_dropped_lets_the_next_call_in(model):
    stream = model.stream("abc", GREEDY)
    next(stream)
    del stream
    gc.collect()
    assert model.generate("a", GREEDY)[0].finished


def test_llm_stream_may_be_read_by_another_thread(model):
    stream = model.stream("abc", GREEDY)
    pieces = [next(stream)]
    thread = threading.Thread(target=lambda: pieces.extend(stream))
    thread.start()
    thread.join(SECONDS)
    assert "".join(pieces) == model.generate("abc", GREEDY)[0].outputs[0].text


def test_llm_closed_says_so_at_every_method(tiny_model, tmp_path):
    llm = LLM(tiny_model, max_context=96, drafter=None, scoring=True)
    chat, late = ChatSession(llm, sampling_params=GREEDY), llm.stream("abc", GREEDY)
    chat.ask("hi")
    llm.close()
    llm.close()
    for kind in calls(llm, tmp_path):
        with pytest.raises(ClosedError, match=r"the model was closed; a new LLM\(...\) works"):
            kind(0)
    for call in (lambda: chat.ask("more"), lambda: chat.retry(), lambda: next(late), llm.__enter__):
        with pytest.raises(ClosedError):
            call()
    assert len(chat.turns) == 1
    chat.save(tmp_path / "chat.json")


def test_llm_close_in_a_stream_s_own_thread_ends_it():
    llm = new_llm()
    jobs = [llm.job([1, 2, 3], GREEDY, 0)]
    running = llm.run_jobs(jobs, burst=1)
    next(running)
    other = llm.run_jobs([llm.job([4], GREEDY, 1)])
    llm.close()
    assert jobs[0].output is not None
    assert jobs[0].output.outputs[0].finish_reason == "abort"
    assert list(running) == []
    with pytest.raises(StopIteration):
        next(other)


def test_llm_close_inside_a_running_call_is_refused():
    llm = new_llm()

    def jobs():
        yield llm.job([1, 2, 3], GREEDY, 0)
        with pytest.raises(RequestError, match="closing the model after its end works"):
            llm.close()

    assert [job.output is not None for job in llm.run_jobs(jobs(), ahead=1)][-1]
    llm.close()


def test_llm_close_waits_for_another_thread_s_call():
    llm = new_llm()
    running = llm.run_jobs([job := llm.job([1, 2, 3], GREEDY, 0)], burst=1)
    next(running)
    thread = threading.Thread(target=llm.close)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert len(list(running)) > 1
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert job.output is not None
    assert job.output.outputs[0].finish_reason == "length"
    with pytest.raises(ClosedError):
        llm.generate([[1]], GREEDY)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_llm_in_a_forked_child_says_so_and_ends(tmp_path):
    script = """
        import os, warnings
        warnings.simplefilter("ignore")
        from specmemo_jax import LLM, SamplingParams
        from specmemo_jax.errors import ForkError
        from specmemo_jax.testing import TINY, tiny_llama
        llm = LLM(TINY, tiny_llama(), max_context=64, drafter=None)
        greedy = SamplingParams(temperature=0, max_tokens=12)
        running = llm.run_jobs([llm.job([1, 2, 3], greedy, 0)], burst=1)
        next(running)
        pid = os.fork()
        if pid == 0:
            calls = lambda: llm.generate([[1]], greedy), lambda: llm.log_likelihoods([1, 2]), llm.__enter__
            for call in calls:
                try:
                    call()
                except ForkError as error:
                    print("child:", error, flush=True)
            llm.close()
            del running
            os._exit(0)  # as multiprocessing's children end
        else:
            _, status = os.waitpid(pid, 0)
            print("parent:", status, len(list(running)) > 1, llm.generate([[1]], greedy)[0].finished)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.stdout.count("child: this model was made before the process forked") == 3, done.stderr
    assert "parent: 0 True True" in done.stdout


def test_turn_that_is_waited_for_when_the_model_closes_is_refused():
    turn, entered, found = Turn(), threading.Event(), []

    def waits():
        entered.set()
        try:
            with turn.held():
                found.append("in")
        except ClosedError as error:
            found.append(str(error))

    with turn.held():
        thread = threading.Thread(target=waits)
        thread.start()
        entered.wait(SECONDS)
        turn._closed = True  # as by a third thread that was first
    thread.join(SECONDS)
    assert found == ["the model was closed; a new LLM(...) works"]
