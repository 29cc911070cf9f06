"""Images decoded as by libjpeg 9.

`libjpeg9_pixels.npz` holds JPEG files (`*.jpg`, written by Pillow 13) and what Pillow 8.4.0, whose wheel holds libjpeg
9.0, makes of them (`*.rgb`).
"""

from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bevfusion.data.pipelines import LoadMultiViewImageFromFiles
from bevfusion.data.pipelines.libjpeg9 import decode_libjpeg9
from bevfusion.errors import InputError

PIXELS = np.load(Path(__file__).with_name("libjpeg9_pixels.npz"))
NAMES = [name.removesuffix(".jpg") for name in PIXELS.files if name.endswith(".jpg")]


def write(folder, name):
    path = folder / f"{name}.jpg"
    path.write_bytes(PIXELS[path.name].tobytes())
    return str(path)


def load(path, **options):
    return np.asarray(LoadMultiViewImageFromFiles(**options)({"image_paths": [str(path)]})["img"][0])


def with_pillow(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def noise(width=50, height=39):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_those_of_libjpeg9(tmp_path, name):
    np.testing.assert_array_equal(load(write(tmp_path, name)), PIXELS[f"{name}.rgb"])


def test_pillow_itself_gives_other_pixels(tmp_path):
    path = write(tmp_path, "part_blocks")
    np.testing.assert_array_equal(load(path, decoder="pillow"), with_pillow(path))
    assert (load(path, decoder="pillow") != load(path)).any()


@pytest.mark.parametrize(
    ("mode", "file", "options"),
    [
        ("RGB", "444.jpg", {"subsampling": "4:4:4"}),
        ("RGB", "422.jpg", {"subsampling": "4:2:2"}),
        ("RGB", "progressive.jpg", {"subsampling": "4:2:0", "progressive": True}),
        ("RGB", "rgb.jpg", {"keep_rgb": True}),
        ("L", "grey.jpg", {}),
        ("CMYK", "cmyk.jpg", {}),
        ("RGB", "colour.png", {}),
        ("RGBA", "transparent.png", {}),
        ("P", "palette.png", {}),
    ],
)
def test_other_files_are_decoded_by_pillow(tmp_path, mode, file, options):
    path = tmp_path / file
    noise().convert(mode).save(path, **options)
    assert decode_libjpeg9(path) is None
    np.testing.assert_array_equal(load(path), with_pillow(path))


def test_scans_of_single_components_are_decoded_by_pillow(tmp_path):
    content = PIXELS["one_macroblock.jpg"].tobytes()
    header = bytes([0xFF, 0xDA, 0, 12, 3, 1, 0x00, 2, 0x11, 3, 0x11, 0, 63, 0])
    start = content.index(header)
    scans = [bytes([0xFF, 0xDA, 0, 8, 1, part, tables, 0, 63, 0]) for part, tables in ((1, 0), (2, 0x11), (3, 0x11))]
    path = tmp_path / "scans.jpg"
    path.write_bytes(
        content[:start] + b"".join(scan + content[start + len(header) : -2] for scan in scans) + b"\xff\xd9"
    )
    assert decode_libjpeg9(path) is None
    np.testing.assert_array_equal(load(path), with_pillow(path))


@pytest.mark.parametrize("name", ["noise", "restart_markers"])
def test_damage_is_an_input_error_or_an_image(tmp_path, name):
    """Where Pillow makes an image of a damaged file, so do we; where it refuses, the complaint names the file."""
    rng = np.random.default_rng(0)
    content, path = PIXELS[f"{name}.jpg"], tmp_path / "damaged.jpg"
    loader, outcomes = LoadMultiViewImageFromFiles(), set()
    for _ in range(400):
        damaged = content.copy()
        damaged[rng.integers(2, len(content), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            expected = with_pillow(path).shape
        except (OSError, SyntaxError, ValueError):
            with pytest.raises(InputError, match=r"damaged.jpg can't be decoded"):
                loader({"image_paths": [str(path)]})
            outcomes.add("refused")
        else:
            assert np.asarray(loader({"image_paths": [str(path)]})["img"][0]).shape == expected
            outcomes.add("decoded")
    assert outcomes == {"refused", "decoded"}


def test_truncated_files_are_refused(tmp_path):
    content, path = PIXELS["part_blocks.jpg"].tobytes(), tmp_path / "short.jpg"
    for length in range(0, len(content) - 40, 31):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"short.jpg can't be decoded"):
            load(path)


def test_forked_workers_decode(tmp_path):
    loader, path = LoadMultiViewImageFromFiles(), write(tmp_path, "saturated")
    with get_context("fork").Pool(2) as pool:
        results = pool.map_async(loader, [{"image_paths": [path]}] * 4).get(timeout=100)
    for result in results:
        np.testing.assert_array_equal(np.asarray(result["img"][0]), PIXELS["saturated.rgb"])
