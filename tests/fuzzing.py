"""Damaging files at random, the same way for the same seed, and judging what a reader makes of them."""

import argparse
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

SECONDS = 120  # longer than any reader of these files takes
REFUSALS = ("InputError", "QuantizationError", "UsageError")


class Verdict(NamedTuple):
    """What became of a mutated file: `refused`, `correct`, or a fault with its story."""

    kind: str
    story: str = ""


def damage(data: bytes, draw: Random) -> tuple[str, bytes]:
    """Change a file's bytes in one of ten ways; returns what was done, and the new bytes."""
    start = draw.randrange(len(data))
    size = min(1 << draw.randrange(14), len(data) - start)
    noise = draw.randbytes(size)
    head = draw.randrange(min(len(data), 4096))
    one = bytes([1 << draw.randrange(8)])
    done = {
        f"flip a bit at {start}": lambda: data[:start] + bytes([data[start] ^ one[0]]) + data[start + 1 :],
        f"flip a bit at {head}": lambda: data[:head] + bytes([data[head] ^ one[0]]) + data[head + 1 :],
        f"flip a bit {head} before the end": lambda: (
            data[: -head - 1] + bytes([data[-head - 1] ^ one[0]]) + data[-head or len(data) :]
        ),
        f"overwrite {size} bytes at {start}": lambda: data[:start] + noise + data[start + size :],
        f"zero {size} bytes at {start}": lambda: data[:start] + bytes(size) + data[start + size :],
        f"cut off at {start}": lambda: data[:start],
        f"cut off at {head}": lambda: data[:head],
        f"take out {size} bytes at {start}": lambda: data[:start] + data[start + size :],
        f"put in {size} bytes at {start}": lambda: data[:start] + noise + data[start:],
        f"append {size} bytes": lambda: data + noise,
    }
    what = draw.choice(list(done))
    return what, done[what]()


def judge(read: Callable[[], bool], path: Path) -> Verdict:
    """Run a reader, which returns whether its result is correct, and say what came of it.

    A refusal has to be one line that names the file.
    """
    try:
        with time_limit(SECONDS):
            correct = read()
    except Exception as error:
        if type(error).__name__ not in REFUSALS:
            return Verdict("traceback", "".join(traceback.format_exception(error)[-3:]))
        if "\n" in str(error) or path.name not in str(error):
            return Verdict("unclear refusal", str(error))
        return Verdict("refused", str(error))
    return Verdict("correct") if correct else Verdict("wrong result")


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in a `with` block that takes longer."""

    def stop(*_):
        raise TimeoutError(f"a hang: more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(trials: dict[str, Callable[[int], tuple[str, Verdict]]], count: int, seed: int) -> Counter:
    """Try seeds in turn over all `trials`, print every fault, and return how often each verdict was given."""
    verdicts: Counter = Counter()
    start = time.monotonic()
    for number in range(seed, seed + count):
        name = list(trials)[number % len(trials)]
        what, verdict = trials[name](number)
        verdicts[name, verdict.kind] += 1
        if verdict.kind not in ("refused", "correct"):
            print(f"seed {number}: {name}: {what}: {verdict.kind}\n{verdict.story}", flush=True)
    for (name, kind), times in sorted(verdicts.items()):
        print(f"{times:6d} {name}: {kind}")
    print(f"{count} mutations in {time.monotonic() - start:.0f} s")
    return verdicts


def main(trials: dict[str, Callable[[int], tuple[str, Verdict]]]) -> None:
    """The command line of a module of trials; exits with 1 if there was a fault."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    verdicts = run(trials, args.count, args.seed)
    sys.exit(any(kind not in ("refused", "correct") for _, kind in verdicts))
