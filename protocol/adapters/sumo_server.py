"""The simulator behind `sumo:`, a program of its own that speaks the wire of docs/remote.md."""

from __future__ import annotations

import argparse
import os
import sys
from functools import cache

from bm3il.protocol.adapters.wire import FAIL, HEAD


def main() -> None:
    """Serve until the end of standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    for option in ("routes", "closed"):
        parser.add_argument(f"--{option}", default="")
    parser.add_argument("--follow", nargs="*", default=())
    for option in ("vehicles", "steps", "interval"):
        parser.add_argument(f"--{option}", type=int, required=True)
    given = vars(parser.parse_args())
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # SUMO prints, and already when it is imported
    from bm3il.protocol.adapters.sumo_copies import Server

    # Made at the first question: what goes wrong in making it is then told by an answer, FAIL.
    server = cache(lambda: Server(**given))
    while len(head := questions.read(HEAD.size)) == HEAD.size:
        kind, length = HEAD.unpack(head)
        body = questions.read(length)
        try:
            kind, body = server().answer(kind, body)
        except Exception as error:
            kind, body = FAIL, f"{type(error).__name__}: {error}".encode()
        answers.write(HEAD.pack(kind, len(body)) + body)
        answers.flush()


if __name__ == "__main__":
    main()
