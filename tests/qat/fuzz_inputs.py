"""Damaged configs and info files given to `qat/ptq.py`: a run, or a refusal in one line.

`python -m tests.qat.fuzz_inputs --count 1000` tries many; `test_fuzz_inputs.py` some.
"""

import json
import pickle
import random
import resource
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

from bevfusion.config import load_config
from bevfusion.data import frames_of, unreadable_frames
from bevfusion.errors import InputError
from qat.frames import choose_frames, first_readable
from tests.fuzzing import SECONDS, Verdict, damage, main, time_limit
from tests.qat.demo_samples import CKPT, CONFIG, SMALLER, write_world
from tests.qat.mutations import damage_structure
from tests.qat.ptq_samples import Outcome, run_here

ANNOTATIONS = "data.train.dataset.ann_file="
MEMORY = 16 * 2**30  # bytes of address space: a damaged size is not to fill the machine

Damage = Callable[[Path, random.Random], list]


def config_structure(world: Path, rng: random.Random) -> list:
    """A config with other values than it should have."""
    return _config(world, damage_structure(_resolved(world), rng))


def config_text(world: Path, rng: random.Random) -> list:
    """A config file with damaged characters."""
    text = yaml.safe_dump(_resolved(world), sort_keys=False).encode()
    return _config(world, damage(text, rng)[1])


def pickle_structure(world: Path, rng: random.Random) -> list:
    """An info file with other values than it should have."""
    return _infos(world, pickle.dumps(damage_structure(_plain(_content(world)), rng)), ".pkl")


def pickle_bytes(world: Path, rng: random.Random) -> list:
    """An info file with damaged bytes."""
    return _infos(world, damage((world / "nuscenes_infos_train.pkl").read_bytes(), rng)[1], ".pkl")


def json_structure(world: Path, rng: random.Random) -> list:
    """The same as JSON, where NaN and huge numbers are spelt out."""
    return _infos(world, json.dumps(damage_structure(_plain(_content(world)), rng)).encode(), ".json")


def json_bytes(world: Path, rng: random.Random) -> list:
    """A JSON file with damaged characters."""
    return _infos(world, damage(json.dumps(_plain(_content(world))).encode(), rng)[1], ".json")


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


def run(world: Path, save: Path, kind: Damage, seed: int, whole: bool = False) -> Outcome:
    """A dry run on a damaged input, and if that finds nothing wrong and `whole` is asked for, a real one."""
    given = ["--ckpt", CKPT, "--device", "cpu", "--workers", 0, "--no-verify", "--calib-pipeline", "test"]
    given += ["--calibrate_batch", 1, "--save", save, *kind(world, random.Random(f"{kind.__name__} {seed}"))]
    done = run_here("--dry-run", *given)
    return run_here(*given) if done.status == 0 and whole else done


def verdict(done: Outcome) -> Verdict:
    """What to make of how a run ended."""
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    if done.status == 0:
        return Verdict("correct")
    if done.status == 2 and len(errors) == 1 and "Traceback" not in done.err:
        return Verdict("refused", errors[0])
    return Verdict(f"exit status {done.status}", done.err[-2000:])


def trial(world: Path, save: Path, kind: Damage, seed: int) -> tuple[str, Verdict]:
    """One damaged config, run as far as it goes, or the frames of one damaged info file, read as a run reads them."""
    what = f"{kind.__name__} {seed}"
    try:
        with time_limit(SECONDS):
            if kind in (config_structure, config_text):
                return what, verdict(run(world, save, kind, seed, whole=True))
            read_frames(world, Path(kind(world, random.Random(f"{what}"))[-1].removeprefix(ANNOTATIONS)))
            return what, Verdict("correct")
    except InputError as error:
        return what, Verdict("unclear refusal" if "\n" in str(error) else "refused", str(error))
    except Exception as error:
        return what, Verdict("traceback", "".join(traceback.format_exception(error)[-3:]))


def read_frames(world: Path, infos: Path) -> None:
    """Choose frames of an info file, open the files of all, and load one, without a model."""
    cfg = load_config(CONFIG, [f"dataset_root={world}/", *SMALLER, f"{ANNOTATIONS}{infos}"])
    frames = choose_frames(cfg, "test", 2, 0)
    for error in unreadable_frames(frames_of(frames.dataset), frames.indices).values():
        raise error
    first_readable(frames)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        place = write_world(Path(folder, "world")), Path(folder, "out", "ptq.pth")
        main({kind.__name__: partial(trial, *place, kind) for kind in KINDS})
