"""A worker as a process of its own: ``python -m tests.search.search_worker '<JSON options>'``."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from superlora.search import Evolution, search, searching
from tests.search.spaces import MIDDLE, separable

FEW = Evolution(population=10, parents=4, mutations=4, crossovers=4)
ROOT = Path(__file__).parent.parent.parent


def keys_in(log: Path) -> list[str]:
    """Return the key of every evaluation that a worker has begun."""
    return log.read_text().split() if log.exists() else []


class Worker:
    """A started worker.

    Parameters
    ----------
    storage, log : path
        Where the study is, and where the worker notes its evaluations.
    hang_at : int
        The evaluation that never ends, from 1; 0 for none.
    delay : float
        Seconds that every evaluation takes.
    """

    def __init__(self, storage: Any, log: Path, **options: Any) -> None:
        self.log = log
        given = json.dumps({"storage": str(storage), "log": str(log), **options})
        command = [sys.executable, "-m", "tests.search.search_worker", given]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.line() == "ready"

    def line(self) -> str:
        """Wait for what the worker says next."""
        return self.process.stdout.readline().strip()

    def go(self) -> Worker:
        """Let it begin."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self

    def kill(self) -> None:
        """End it without any chance to tidy up."""
        self.process.kill()
        self.close()

    def finish(self) -> None:
        """Wait for its end."""
        assert self.line() == "done"
        self.close()

    def close(self) -> None:
        """End it, in any case."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def main(options: dict[str, Any]) -> None:
    """Search; say when ready, hanging and done."""
    log, storage = options.pop("log"), options.pop("storage")
    hang_at, delay = options.pop("hang_at", 0), options.pop("delay", 0.0)
    count = 0

    def evaluate(configuration: Any) -> float:
        nonlocal count
        count += 1
        with open(log, "a") as file:
            file.write(MIDDLE.key(configuration) + "\n")
        if count == hang_at:
            print("hanging", flush=True)
            time.sleep(600)
        time.sleep(delay)
        return separable(configuration)

    searching.HEARTBEAT = options.pop("heartbeat", searching.HEARTBEAT)
    print("ready", flush=True)
    sys.stdin.readline()
    search(evaluate, MIDDLE, storage=storage, evolution=FEW, **options)
    print("done", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
