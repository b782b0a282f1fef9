"""Worker processes of the commands: results in the order of the tasks, whichever worker is faster, and no process is
left behind, however the command ends."""

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
from data.storage.errors import OperationError

_Task = TypeVar("_Task")


_Result = TypeVar("_Result")


_INTERRUPTS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


_SIGNAL_REACHES_ALL_S = 0.5
"""A signal to a whole process group arrives in its processes one after the other."""


_LOOK_EVERY_S = 2.0
"""How often dead workers are looked for that the executor does not notice."""


class WorkerError(OperationError):
    """A worker process was killed; the message says what to do."""


def map_in_order(
    work: Callable[[_Task], _Result], tasks: Iterable[_Task], workers: int
) -> Generator[_Result, None, None]:
    """Do the tasks, at most a few ahead of what is taken. Close the generator to stop the workers.

    Args:
        work: picklable; it goes to each worker process once. What it raises is raised here.
        tasks: picklable, taken one by one as workers need them.
        workers: number of processes; 0 works in this process.

    Yields:
        The results in the order of the tasks.

    Raises:
        WorkerError: a worker process was killed.
    """
    if workers == 0:
        yield from map(work, tasks)
        return
    # The resource tracker, which a semaphore would start, takes no notice of Ctrl-C or SIGTERM. A closed terminal must
    # not end it either, which Python would complain of. It keeps the mask that it starts with.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    # Not fork: the progress bar runs a thread. Not spawn: the server imports the libraries once for all.
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("forkserver"),
        initializer=_start_worker,
        initargs=(work,),
    )
    waiting: deque[Future[_Result]] = deque()
    # No interrupt tears the start of a worker apart. Workers start with the first tasks, and keep the mask of then.
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
        # Where a signal ended the whole command, it interrupts this pause, and that is then what is reported.
        time.sleep(_SIGNAL_REACHES_ALL_S)
        raise WorkerError(
            "a worker process was killed, most likely for want of memory; run again with fewer --workers"
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        executor.shutdown(cancel_futures=True)


def _result(executor: ProcessPoolExecutor, future: "Future[_Result]") -> _Result:
    """The result, or BrokenProcessPool.

    All workers of an executor answer through one pipe. One that is killed within an answer leaves the executor waiting
    for the rest of it, and the other workers for their turn, for ever; so this looks after them.
    """
    while not wait([future], timeout=_LOOK_EVERY_S).done:
        # `_processes` is None once the executor knows by itself.
        processes = list((executor._processes or {}).values())  # pyright: ignore[reportPrivateUsage]
        if (
            connection.wait([process.sentinel for process in processes], timeout=0)
            and not wait([future], timeout=_LOOK_EVERY_S).done
        ):
            for process in processes:
                process.kill()
            # The last end for writing, the workers' being gone: the executor reads the end of the pipe and gives up.
            executor._result_queue._writer.close()  # pyright: ignore
            break
    return future.result()


_worker_function: Callable[[Any], Any] | None = None
"""Set once in each worker process, so that a task carries no more than its data."""


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _worker_function
    _worker_function = work
    # Ctrl-C and the end of a terminal are for the main process alone; by SIGTERM the pool ends its workers.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    # A killed command would otherwise leave its workers waiting for tasks for ever: each holds the queue open itself.
    end_with_parent()


def _work(task: Any) -> Any:
    assert _worker_function is not None
    return _worker_function(task)
