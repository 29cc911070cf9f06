"""The demonstration's plan: what is run, and what is skipped because it is done."""

import argparse
import os
from pathlib import Path

from qat import demo
from tests.conftest import ROOT


def arguments(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(
        data=folder / "data", out=folder / "out", scenes=1, frames=4, batches=4, limit=4, device="cpu"
    )


def touch(path: Path, time: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time, time))


def test_a_step_is_done_when_what_it_makes_is_newer_than_what_it_needs(tmp_path):
    source, result = tmp_path / "in", tmp_path / "out"
    step = demo.Step("copy", ("cp",), (result,), (source,))
    touch(source, 100)
    assert not step.done
    touch(result, 200)
    assert step.done
    touch(source, 300)
    assert not step.done


def test_steps_feed_each_other_and_name_files_that_exist(tmp_path):
    steps = demo.plan(arguments(tmp_path))
    made = {demo.FLOAT}
    for step in steps:
        assert set(step.needs) <= made, step.title
        made |= set(step.makes)
    scripts = [word for step in steps for word in step.command if word.endswith(".py")]
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)
    assert (ROOT / demo.FLOAT).is_file()
    assert (ROOT / demo.CONFIG).is_file()


def test_the_summary_gives_both_scores_and_their_difference(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = arguments(tmp_path)
    touch(args.out / "bevfusion_ptq.pth", 1)
    (args.out / "scores.json").write_text('{"a": {"mean_ap": 0.5, "nds": 0.4}, "b": {"mean_ap": 0.495, "nds": 0.41}}')
    text = demo.summary(args)
    assert "50.00" in text
    assert "49.50" in text
    assert "-0.50" in text
    assert "+1.00" in text
