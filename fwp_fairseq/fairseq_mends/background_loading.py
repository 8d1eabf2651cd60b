"""A training that ends before its data does is not aborted at its exit.

fairseq makes batches ready in a daemon thread. When Python ends, such a thread is made to exit where it next wants the
interpreter, and within torch's C++ that calls std::terminate: a training that was done, and had saved everything, now
and then ended with SIGABRT.

It can go when fairseq's BackgroundConsumer is joined at the end of a training.
"""

import atexit
import contextlib
import queue
import threading
import time

# Longer than it takes to make up a batch. After that Python ends as it would have.
_SECONDS = 60.0


CHANGES = ()


def install() -> None:
    """Stop the threads when Python ends."""
    atexit.register(stop_background_loading)


def stop_background_loading() -> None:
    """Let the threads in which fairseq makes up batches come to their end."""
    from fairseq.data.iterators import BackgroundConsumer

    consumers = [thread for thread in threading.enumerate() if isinstance(thread, BackgroundConsumer)]
    until = time.monotonic() + _SECONDS
    for consumer in consumers:
        # No more than the batch that it is at.
        consumer._max_len = 0
    for consumer in consumers:
        while consumer.is_alive() and time.monotonic() < until:
            # It may wait for room in its queue.
            with contextlib.suppress(queue.Empty):
                consumer._queue.get_nowait()
            consumer.join(0.01)
