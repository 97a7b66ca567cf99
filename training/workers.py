"""Processes for work that may hang or crash: a pool (`in_processes`), or one process for one call (`in_child`).

decord can crash on a damaged clip, or hang while it holds Python's lock; then only killing its process helps.
"""

import gc
import itertools
import multiprocessing
import os
import pickle
import select
import signal
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, wait

import torch
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

_function = _timeout = None  # of a pool's worker


def in_processes(function, items, workers: int, timeout: float | None = None, title: str = "") -> Iterator[tuple]:
    """Yield (item, result, None) as results come in, or (item, None, "hung" or "died"); `title`: of a progress bar.

    A worker that takes longer than `timeout` seconds over one item is killed and replaced; so is one that dies. An
    exception in `function` is raised here, with its trace.
    """
    todo, running, workers = iter(items), {}, max(1, workers)
    context = multiprocessing.get_context("fork")  # workers inherit `function` and its data instead of unpickling it
    with (ProcessPool(workers, initializer=_start_worker, initargs=(function, timeout), context=context) as pool,
          tqdm(total=len(items), desc=f"  {title:8}", unit="", disable=None, mininterval=0.5, leave=False) as bar):
        try:
            while True:
                for item in itertools.islice(todo, 2 * workers - len(running)):
                    running[pool.schedule(_work_on, [item], timeout=timeout)] = item
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    item, result, failure = running.pop(future), None, None
                    try:
                        result = future.result()
                    except TimeoutError:
                        failure = "hung"
                    except ProcessExpired:
                        failure = "died"
                    bar.update()
                    yield item, result, failure
        finally:
            pool.stop()  # also where the caller stops early or `function` has failed: nothing is left running


def _start_worker(function, timeout: float | None) -> None:
    global _function, _timeout
    _function, _timeout = function, timeout
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hide decord's messages: the report says what they mean
    torch.set_num_threads(1)


def _work_on(item):
    if _timeout is None:
        return _function(item)
    time.sleep(0.02)  # pebble loses an item whose worker dies before the pool has noted that it started
    signal.alarm(int(2 * _timeout) + 60)  # ends a hung worker whose parent was killed; otherwise the pool is faster
    result = _function(item)
    signal.alarm(0)
    return result


def in_child(function, timeout: float) -> tuple[object, str | None]:
    """(`function()`, None), computed in a forked process; (None, what happened) where that hangs or dies.

    An exception in `function` is raised here. Works in a data loader's worker too, where multiprocessing may not start
    processes. In a worker of `in_processes` with a timeout, the call is made right there: the pool can end it.
    """
    if _timeout is not None:
        return function(), None
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as answers:
        with open(writing, "wb") as pipe:  # closed here after the fork, so that the pipe ends when the child does
            child = os.fork()
            if child == 0:
                _answer(function, pipe, timeout)
        content = None
        try:
            content = _read_all(answers, timeout)
        finally:
            if content is None:  # too late, or stopped here by Ctrl-C
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
    if content is None:
        return None, f"did not finish within {timeout:g} s and was stopped"
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        return None, f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    result, error = pickle.loads(content)
    if error is not None:
        raise error
    return result, None


def _answer(function, pipe, timeout: float) -> None:
    """In the child: write (result, None) or (None, exception) and exit, without what the parent does at its exit."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # whether they end the work is the parent's decision
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(timeout) + 60)  # ends a hung child whose parent was killed; otherwise the parent is faster
        gc.disable()  # garbage of the parent may be tensors on a GPU, which a forked process must not touch
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hide decord's messages: the parent says what they mean
        try:
            answer = function(), None
        except Exception as error:
            answer = None, _sendable(error)
        pickle.dump(answer, pipe, protocol=5)
        pipe.flush()
        code = 0
    finally:
        os._exit(code)


def _sendable(error: Exception) -> Exception:
    """The error with its trace as a note; a RuntimeError with that text where it cannot be pickled."""
    trace = traceback.format_exc()
    try:
        error.add_note(f"In the child process:\n{trace}")
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(trace)


def _read_all(pipe, timeout: float) -> bytes | None:
    """What comes out of the pipe until its end; None where that takes longer than `timeout` seconds."""
    end, parts = time.monotonic() + timeout, []
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while (left := end - time.monotonic()) > 0 and poll.poll(1000 * left):
        part = pipe.read(1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None
