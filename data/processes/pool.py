"""Worker processes of the commands. Results keep the order of the tasks. No process survives the command, however it
ends."""

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, resource_tracker
from typing import Any, TypeVar

from data.processes.child import end_with_parent
from data.processes.sockets import use_short_socket_folder
from data.storage.errors import OperationError

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_INTERRUPTS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
_SIGNAL_REACHES_ALL_S = 0.5
"""A signal to a process group reaches its processes one after another."""
_LOOK_EVERY_S = 2.0
"""Interval of the search for dead workers that the executor misses."""


class WorkerError(OperationError):
    """A worker process was killed; the message says what to do."""


def map_in_order(
    work: Callable[[_Task], _Result], tasks: Iterable[_Task], workers: int
) -> Generator[_Result, None, None]:
    """Run the tasks, at most a few ahead of the consumer. Close the generator to stop the workers.

    Args:
        work: picklable; sent to each worker process once. Its exceptions are raised here.
        tasks: picklable, taken one by one as workers need them.
        workers: number of processes; 0: this process does the work.

    Yields:
        The results in the order of the tasks.

    Raises:
        WorkerError: a worker process was killed.
    """
    if workers == 0:
        yield from map(work, tasks)
        return
    # The resource tracker, which a semaphore would start, ignores Ctrl-C and SIGTERM. A closed terminal must not end it
    # either, or Python prints a warning. It keeps its initial signal mask.
    use_short_socket_folder()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    # Not fork: the progress bar runs a thread. Not spawn: a server imports the libraries only once.
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("forkserver"),
        initializer=_start_worker,
        initargs=(work,),
    )
    waiting: deque[Future[_Result]] = deque()
    # No signal may interrupt the start of a worker. Workers start with the first tasks and inherit this mask.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        for task in tasks:
            waiting.append(executor.submit(_work, task))
            if len(waiting) >= workers:
                signal.pthread_sigmask(signal.SIG_SETMASK, previous)
            if len(waiting) > 4 * workers:
                yield _result(executor, waiting.popleft())
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        while waiting:
            yield _result(executor, waiting.popleft())
    except BrokenProcessPool:
        # A signal to the whole command interrupts this pause, and is then reported instead.
        time.sleep(_SIGNAL_REACHES_ALL_S)
        raise WorkerError(
            "a worker process was killed, most likely for want of memory; run again with fewer --workers"
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        executor.shutdown(cancel_futures=True)


def _result(executor: ProcessPoolExecutor, future: "Future[_Result]") -> _Result:
    """The result, or BrokenProcessPool.

    All workers of an executor answer through one pipe. If one is killed while it answers, the executor waits forever
    for the rest, and the other workers for their turn. So this checks for dead workers.
    """
    while not wait([future], timeout=_LOOK_EVERY_S).done:
        # `_processes` is None after the executor noticed.
        processes = list((executor._processes or {}).values())  # pyright: ignore[reportPrivateUsage]
        if (
            connection.wait([process.sentinel for process in processes], timeout=0)
            and not wait([future], timeout=_LOOK_EVERY_S).done
        ):
            for process in processes:
                process.kill()
            # This was the last write end, as the workers are dead: the executor reads EOF and gives up.
            executor._result_queue._writer.close()  # pyright: ignore
            break
    return future.result()


_worker_function: Callable[[Any], Any] | None = None
"""Set once in each worker process, so that a task carries only its data."""


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _worker_function
    _worker_function = work
    # Only the main process handles Ctrl-C and a closed terminal. The pool ends its workers by SIGTERM.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    # After a killed command, workers would wait for tasks forever: each holds the queue open itself.
    end_with_parent()


def _work(task: Any) -> Any:
    assert _worker_function is not None
    return _worker_function(task)
