"""Programs in processes of their own that wait for calls, so that other flags of XLA can take turns within a round."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping


def serve(calls: Mapping[str, Callable[[], None]]) -> None:
    """In the child: makes the call that each line of the input names, and answers when it is done."""
    print("ready", flush=True)
    for line in sys.stdin:
        calls[line.strip()]()
        print("done", flush=True)


@contextlib.contextmanager
def child(arguments: list[str], **environment: str) -> Iterator[Callable[[str], None]]:
    """In the parent: starts Python with these arguments, and lends what makes one call there and waits for it."""
    command, pipe = [sys.executable, *arguments], subprocess.PIPE
    with subprocess.Popen(command, env=os.environ | environment, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def expect(word: str) -> None:
            if (line := process.stdout.readline().strip()) != word:
                raise RuntimeError(f"`{' '.join(command)}` said {line!r} and not {word!r}; status {process.poll()}")

        def call(name: str) -> None:
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            expect("done")

        try:
            expect("ready")
            yield call
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # the end of its input is the end of it
