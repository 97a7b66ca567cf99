"""Worker processes for work that may hang or crash.

decord can crash on a damaged clip, or hang while it holds Python's lock; then only killing its process helps.
"""

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, wait

import torch
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm


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
