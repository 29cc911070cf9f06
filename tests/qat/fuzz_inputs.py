"""Damaged configs and info files given to `qat/ptq.py`: how each run ends.

As a script it tries many: `python -m tests.qat.fuzz_inputs COUNT [FIRST_SEED]`.
"""

import json
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import yaml

from bevfusion.config import load_config
from tests.qat.demo_samples import CKPT, CONFIG, SMALLER, write_world
from tests.qat.mutations import damage_bytes, damage_structure
from tests.qat.ptq_samples import Outcome, run_here

Damage = Callable[[Path, random.Random], list]


def config_structure(world: Path, rng: random.Random) -> list:
    """A config with other values than it should have."""
    return _config(world, damage_structure(_resolved(world), rng))


def config_text(world: Path, rng: random.Random) -> list:
    """A config file with damaged characters."""
    text = yaml.safe_dump(_resolved(world), sort_keys=False).encode()
    return _config(world, damage_bytes(text, rng))


def pickle_structure(world: Path, rng: random.Random) -> list:
    """An info file with other values than it should have."""
    return _infos(world, pickle.dumps(damage_structure(_plain(_content(world)), rng)), ".pkl")


def pickle_bytes(world: Path, rng: random.Random) -> list:
    """An info file with damaged bytes."""
    return _infos(world, damage_bytes((world / "nuscenes_infos_train.pkl").read_bytes(), rng), ".pkl")


def json_structure(world: Path, rng: random.Random) -> list:
    """The same as JSON, where NaN and huge numbers are spelt out."""
    return _infos(world, json.dumps(damage_structure(_plain(_content(world)), rng)).encode(), ".json")


def json_bytes(world: Path, rng: random.Random) -> list:
    """A JSON file with damaged characters."""
    return _infos(world, damage_bytes(json.dumps(_plain(_content(world))).encode(), rng), ".json")


def undamaged_config(world: Path, _: random.Random) -> list:
    """The config as it is."""
    return _config(world, _resolved(world))


def undamaged_infos(world: Path, _: random.Random) -> list:
    """The info file as it is, in JSON."""
    return _infos(world, json.dumps(_plain(_content(world))).encode(), ".json")


KINDS: tuple[Damage, ...] = (
    *(config_structure, config_text),
    *(pickle_structure, pickle_bytes, json_structure, json_bytes),
)


def _resolved(world: Path) -> dict:
    return json.loads(json.dumps(load_config(CONFIG, [f"dataset_root={world}/", *SMALLER])._cfg_dict.to_dict()))


def _content(world: Path) -> dict:
    return pickle.loads((world / "nuscenes_infos_train.pkl").read_bytes())


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _config(world: Path, content: dict | bytes) -> list:
    file = world / "damaged.yaml"
    file.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content, sort_keys=False).encode())
    return ["--config", file]


def _infos(world: Path, content: bytes, suffix: str) -> list:
    file = world / f"damaged{suffix}"
    file.write_bytes(content)
    return [
        "--config",
        CONFIG,
        "--dataset-root",
        world,
        "--cfg-options",
        *SMALLER,
        f"data.train.dataset.ann_file={file}",
    ]


def run(world: Path, save: Path, damage: Damage, seed: int, whole: bool = False) -> Outcome:
    """A dry run on a damaged input, and if that finds nothing wrong and `whole` is asked for, a real one."""
    given = ["--ckpt", CKPT, "--device", "cpu", "--workers", 0, "--no-verify", "--calib-pipeline", "test"]
    given += ["--calibrate_batch", 1, "--save", save, *damage(world, random.Random(f"{damage.__name__} {seed}"))]
    done = run_here("--dry-run", *given)
    return run_here(*given) if done.status == 0 and whole else done


def problem(done: Outcome) -> str | None:
    """What is wrong with how a run ended; None if nothing is."""
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    if done.status == 0 or (done.status == 2 and len(errors) == 1 and "Traceback" not in done.err):
        return None
    return f"status {done.status}: {done.err[-2000:]}"


def main(count: int, first: int) -> int:
    """Try `count` damaged inputs of all kinds in turn, print what is wrong with any, and how they ended."""
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
    ended, wrong = Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        world = write_world(Path(folder))
        for number in range(count):
            damage, seed = KINDS[number % len(KINDS)], first + number // len(KINDS)
            signal.alarm(300)  # a hang ends the process
            start = time.perf_counter()
            try:
                done = run(world, Path(folder, "out", "ptq.pth"), damage, seed, whole=True)
            except Exception as error:  # it would have been a traceback
                found: str | None = "".join(traceback.format_exception(error)[-3:])
            else:
                found = problem(done)
                ended[damage.__name__, done.status] += 1
                if done.status > 128:  # the signal was meant for us
                    break
            if found:
                wrong += 1
                print(f"{damage.__name__} {seed} ({time.perf_counter() - start:.0f} s): {found}", flush=True)
    print(f"{count} inputs, {wrong} wrong: {dict(ended)}")
    return wrong


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0) > 0)
