"""Generates a world: shares the keyframes out over processes, resumes what was interrupted, writes the tables last."""

import json
import multiprocessing
import os
import shutil
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import cv2
from tqdm import tqdm

import bevfusion
from bevfusion.errors import InputError
from bevfusion.processes import start_worker
from bevfusion.synthetic.capture import capture, map_file, record_path, write_atomically
from bevfusion.synthetic.options import Options
from bevfusion.synthetic.tables import build_tables

MANIFEST = "synthetic.json"
CHUNK = 5  # keyframes a process takes at a time: it builds their scene once


def generate(
    out: Path,
    *,
    version: str = "v1.0-mini",
    scenes: int = 8,
    val_scenes: int = 2,
    frames: int = 20,
    image_size: tuple[int, int] = (800, 450),
    seed: int = 0,
    workers: int | None = None,
    sweeps: int = 2,
    camera_sweeps: int = 0,
    sweep_motion: bool = False,
    progress: bool = True,
) -> None:
    """Write a complete nuScenes data set of synthetic scenes to the folder `out`.

    `scenes` and `val_scenes` are the numbers of scenes with training and with validation names of `version`; each has
    `frames` keyframes (2 a second) with six images of `image_size` (width, height) and a LiDAR sweep, led up to by
    `sweeps` further LiDAR sweeps (20 a second) and `camera_sweeps` further images (12 a second) of every camera.
    `sweep_motion` lets sensor and objects move during a sweep. Equal arguments give equal bytes, whatever `workers` is
    (default: one per processor); a world that was interrupted is completed. Raises InputError for arguments out of
    range, a folder that can't be written, and one that holds anything but this world.
    """
    options = Options(version, scenes, val_scenes, frames, tuple(image_size), seed, sweeps, camera_sweeps, sweep_motion)
    workers = workers if workers is not None else os.cpu_count() or 1
    if workers < 1:
        raise InputError(f"--workers is {workers}: it must be at least 1")
    out = Path(out)
    try:
        _claim(out, options)
        _capture_all(options, out, workers, progress)
        _write_tables(options, out)
    except OSError as error:
        where = error.filename or out
        raise InputError(
            f"can't write the world at {where}: {error.strerror or error}; mend that or choose another --out"
        ) from error


def _claim(out: Path, options: Options) -> None:
    """Make the folder this world's own, or check that it is."""
    manifest = json.dumps(options.manifest(bevfusion.__version__), indent=1)
    file = out / MANIFEST
    if file.exists():
        if file.read_text() != manifest:
            raise InputError(
                f"{out} holds a world made with other options (see {file}): delete it or choose another --out"
            )
        return
    if out.is_dir() and any(not entry.name.startswith(f".{MANIFEST}") for entry in out.iterdir()):
        raise InputError(f"{out} is not empty and holds no synthetic world: choose another --out")
    write_atomically(file, manifest.encode())


def _missing(options: Options, out: Path) -> list[tuple[str, int]]:
    """Keyframes of which a file is missing, or the record while the tables are yet to be written."""
    complete = (out / options.version).exists()
    missing = []
    for name in options.scene_names():
        for k in range(options.frames):
            files = [out / shot.filename for shot in options.shots(name, k)]
            files += [out / map_file(name)] if k == 0 else []
            files += [] if complete else [record_path(out, name, k)]
            if not all(file.exists() for file in files):
                missing.append((name, k))
    return missing


def _capture_all(options: Options, out: Path, workers: int, progress: bool) -> None:
    missing = _missing(options, out)
    total = len(options.scene_names()) * options.frames
    with tqdm(total=total, initial=total - len(missing), unit="keyframe", disable=not progress) as bar:
        if workers == 1 or len(missing) <= 1:
            for name, k in missing:
                capture(options, out, name, k)
                bar.update()
            return
        # Forked processes share what is imported already.
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
            try:
                for future in as_completed(_submit(pool, options, out, missing)):
                    bar.update(future.result())
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _start_worker() -> None:
    start_worker()
    cv2.setNumThreads(0)


def _submit(pool: Executor, options: Options, out: Path, missing: list[tuple[str, int]]) -> list[Future]:
    chunks: dict[tuple[str, int], list[int]] = {}
    for name, k in missing:
        chunks.setdefault((name, k // CHUNK), []).append(k)
    return [pool.submit(_capture_chunk, options, out, name, keys) for (name, _), keys in chunks.items()]


def _capture_chunk(options: Options, out: Path, name: str, keyframes: list[int]) -> int:
    for k in keyframes:
        capture(options, out, name, k)
    return len(keyframes)


def _write_tables(options: Options, out: Path) -> None:
    """Write all tables into a folder that gets its name when it is complete; then the records are of no more use."""
    final, part = out / options.version, out / f".{options.version}.part"
    if not final.exists():
        scenes = (
            (name, [json.loads(record_path(out, name, k).read_text()) for k in range(options.frames)])
            for name in options.scene_names()
        )
        for table, rows in build_tables(options, scenes).items():
            write_atomically(part / f"{table}.json", json.dumps(rows, separators=(",", ":")).encode())
        os.replace(part, final)
    shutil.rmtree(out / ".records", ignore_errors=True)
