"""Many slow calls at once."""

from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_threads(
    call: Callable[[T], R], items: Iterable[T], n_threads: int
) -> Iterator[tuple[T, R | Exception]]:
    """Each item with what ``call`` returned or raised, as they are done.

    An item is taken when a thread is free for it, and none any more once the iterator is closed (as it is when
    the loop over it ends by an exception or ``break``). The threads are daemons: one that waits for a server
    keeps no process alive after Ctrl-C.
    """
    source, lock = iter(items), Lock()
    done: SimpleQueue[tuple[T, R | Exception] | BaseException | None] = SimpleQueue()
    stopped = False

    def work() -> None:
        try:
            while not stopped:
                with lock:
                    item = next(source)
                try:
                    result: R | Exception = call(item)
                except Exception as error:
                    result = error
                done.put((item, result))
        except StopIteration:
            done.put(None)
        except BaseException as error:  # from the items themselves
            done.put(error)
        else:
            done.put(None)

    threads = [Thread(target=work, daemon=True) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    try:
        ended = 0
        while ended < n_threads:
            found = done.get()
            if found is None:
                ended += 1
            elif isinstance(found, BaseException):
                raise found
            else:
                yield found
    finally:
        stopped = True
