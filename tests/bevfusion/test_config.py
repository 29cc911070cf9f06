"""The YAML tree resolves to the reference configurations, and what can't be resolved is refused with its place."""

import json
import logging
from pathlib import Path

import pytest

from bevfusion.config import load_config
from bevfusion.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SECFPN = Path("nuscenes/det/transfusion/secfpn")
RESNET50 = SECFPN / "camera+lidar/resnet50/convfuser.yaml"
SWINT = SECFPN / "camera+lidar/swint_v0p075/convfuser.yaml"
VOXELNET = SECFPN / "lidar/voxelnet_0p075.yaml"


def resolved(path: Path, *options: str) -> dict:
    return load_config(path, options)._cfg_dict.to_dict()


@pytest.fixture
def tree(tmp_path):
    """Return a function that writes YAML files under a folder and gives the path of the last one."""

    def write(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("path", "reference"),
    [(RESNET50, "config_resnet50_convfuser.json"), (SWINT, "config_swint_v0p075_convfuser.json")],
)
def test_fusion_configs_equal_the_reference_key_by_key(golden, path, reference):
    expected = json.loads((golden / reference).read_text())
    config = resolved(ROOT / "configs" / path)
    assert config.keys() == expected.keys()
    for key in expected:
        assert config[key] == expected[key], key


def test_lidar_only_config_differs_from_fusion_in_encoders_and_schedule():
    lidar, fusion = (resolved(ROOT / "configs" / path) for path in (VOXELNET, RESNET50))
    assert lidar["model"]["encoders"]["camera"] is None
    assert lidar["model"]["fuser"] is None
    assert lidar["model"]["encoders"]["lidar"] == fusion["model"]["encoders"]["lidar"]
    assert lidar["model"]["heads"] == fusion["model"]["heads"]
    assert lidar["model"]["decoder"] == fusion["model"]["decoder"]
    assert lidar["runner"]["max_epochs"] == lidar["max_epochs"] == 20
    assert lidar["lr_config"] == {"policy": "cyclic"}


def test_relative_absolute_and_linked_paths_agree(monkeypatch):
    expected = resolved(ROOT / "configs" / RESNET50)
    monkeypatch.chdir(ROOT)
    assert resolved(Path("bevfusion/configs") / RESNET50) == expected
    assert resolved(Path("configs") / RESNET50) == expected
    monkeypatch.chdir(ROOT / "configs" / "nuscenes")
    assert resolved(Path("../../bevfusion/configs") / RESNET50) == expected
    assert resolved(RESNET50.relative_to("nuscenes")) == expected


def test_defaults_merge_from_the_top_and_a_missing_one_is_no_gap(tree):
    path = tree(
        default="a: {x: 1, y: 1, z: 1}\nl: [1, 2]\nn: {x: 1}\ns: 1",
        deep__er__default="a: {y: 2, z: 2}\nl: [3]\nn: null\ns: {x: 1}",
        deep__er__leaf="a: {z: 3}",
    )
    assert resolved(path) == {"a": {"x": 1, "y": 2, "z": 3}, "l": [3], "n": None, "s": {"x": 1}}
    assert resolved(path.with_name("default.yaml"))["a"] == {"x": 1, "y": 2, "z": 2}


def test_empty_default_adds_nothing(tree):
    assert resolved(tree(default="# nothing\n", leaf="a: 1")) == {"a": 1}


def test_expressions_follow_references_in_any_order(tree):
    path = tree(
        leaf="""
root: data/
file: ${root + "infos.pkl"}
copy: ${file}
size: [256, 704]
cells: ${[size[0] // 8, size[1] // 8]}
first: ${nested.pairs[0]}
nested: {pairs: [[1, 2], [3, 4]], height: "${size[0]}", sibling: "${nested.height}", head: "${size[:1]}"}
many: ["${nested}", "${-size[0] * 2 + 1}", "${not size}", "${nested['height'] % 100}"]
plain: $5 {x}
"""
    )
    nested = {"pairs": [[1, 2], [3, 4]], "height": 256, "sibling": 256, "head": [256]}
    assert resolved(path) == {
        "root": "data/",
        "file": "data/infos.pkl",
        "copy": "data/infos.pkl",
        "size": [256, 704],
        "cells": [32, 88],
        "first": [1, 2],
        "nested": nested,
        "many": [nested, -511, False, 56],
        "plain": "$5 {x}",
    }


def test_two_uses_of_one_value_are_independent(tree):
    config = load_config(tree(leaf="a: &a [1, {x: 1}]\nb: ${a}\nc: *a"), ["a.1.x=2"])
    assert config.b == [1, {"x": 2}]
    assert config.c == [1, {"x": 1}]
    config.b.append(3)
    assert config.a == [1, {"x": 2}]


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("${__import__('os').getcwd()}", "not allowed"),
        ("${().__class__}", "has no item '__class__'"),
        ("${size.__class__}", "has no item '__class__'"),
        ("${[x for x in size]}", "not allowed"),
        ("${lambda: 1}", "not allowed"),
        ("${size if size else 1}", "not allowed"),
        ("${2 ** 9}", "not allowed"),
        ("${f'{size}'}", "not allowed"),
        ("${siz}", "config has no key 'siz'; nearest: size"),
        ("${section.depht}", "section has no key 'depht'; nearest: depth"),
        ("${size[5]}", "size has no item 5"),
        ("${section[:1]}", "section has no"),
        ("${size + 1}", r"'size \+ 1': can only concatenate"),
        ("${1 / 0}", "division by zero"),
        ("${size +}", "no valid expression"),
        ("${}", "no valid expression"),
        ("${name}.pkl", "must be the whole value"),
        ("${bad.key}", "refers to itself"),
        ("${bad}", "refers to itself"),
        ("${ring}", r"refers to itself: \$\{ring} -> \$\{loop} -> \$\{ring}"),
    ],
)
def test_refused_expressions_name_the_file_and_the_key(tree, expression, complaint):
    keys = "size: [1, 2]\nname: x\nsection: {depth: 1}\nring: ${loop}\nloop: ${ring}\n"
    path = tree(leaf=f"bad: {{key: {json.dumps(expression)}}}\n{keys}")
    with pytest.raises(InputError, match=complaint) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"config {path}: bad.key: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("expression", ["(" * 150 + "1" + ")" * 150 + " +", "-" * 5000 + "1"])
def test_endless_nesting_is_refused(tree, expression):
    path = tree(leaf=f"a: ${{{expression}}}")
    with pytest.raises(InputError, match=r"leaf\.yaml: a: "):
        load_config(path)


def test_options_override_before_expressions_are_evaluated(tree):
    path = tree(leaf="a: {b: 1}\nlist: [{x: 1}, {x: 2}]\nnone: null\nuse: ${a.b}\nuses: ${list[1]}")
    config = resolved(path, "a.b=[1, 2]", "list.1.x=true", "none.type=Fuser", "a.new.deep={k: 1e-3}", "rate=1e-3")
    assert config["use"] == [1, 2]
    assert config["uses"] == {"x": True}
    assert config["none"] == {"type": "Fuser"}
    assert config["a"] == {"b": [1, 2], "new": {"deep": {"k": "1e-3"}}}
    assert config["rate"] == 1e-3
    assert resolved(path, "a=${list}", "none=None", "use='1'") | {"a": 0} == {
        "a": 0,
        "list": [{"x": 1}, {"x": 2}],
        "none": None,
        "use": "1",
        "uses": {"x": 2},
    }


def test_an_option_for_an_unknown_key_is_warned_about(tree, caplog):
    with caplog.at_level(logging.WARNING, logger="bevfusion.config"):
        assert resolved(tree(leaf="dataset_root: a"), "dataset_rot=b") == {"dataset_root": "a", "dataset_rot": "b"}
    assert "option dataset_rot=b: the config had no such key; nearest: dataset_root" in caplog.text


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("a", "expected KEY=VALUE"),
        ("=1", "expected KEY=VALUE"),
        ("a..b=1", "expected KEY=VALUE"),
        ("a=[1", "not YAML"),
        ("a.b=1", r"a is 1, not a section"),
        ("list.2=1", "'2' is no index of a list of 2"),
        ("list.-1.x=1", "'-1' is no index"),
        ("list.x=1", "'x' is no index"),
        ("pipe.0.x=1", r"pipe is '\$\{list}', not a section"),
    ],
)
def test_malformed_options_are_refused(tree, option, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        load_config(tree(leaf="a: 1\nlist: [1, 2]\npipe: ${list}"), [option])
    assert repr(option) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"a: [1", "is not YAML"),
        (b"\xff\xfe\x00\x01binary", "is not YAML"),
        (b"!!python/object/apply:os.getcwd []", "is not YAML"),
        (b"- 1\n- 2\n", "expected 'key: value' lines at the top, found list"),
        (b"a: &a [*a]\n", "contains itself"),
    ],
)
@pytest.mark.parametrize("where", ["leaf", "default"])
def test_unreadable_files_are_named(tree, where, content, complaint):
    path = tree(default="a: 1", leaf="b: 1")
    culprit = path.with_name(f"{where}.yaml")
    culprit.write_bytes(content)
    with pytest.raises(InputError, match=complaint) as caught:
        load_config(path)
    assert str(culprit) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            load_config(path)
