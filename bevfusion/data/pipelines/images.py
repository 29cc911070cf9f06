"""Camera images: loading, the resize-crop-flip-rotate augmentation, normalisation and grid masks."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from bevfusion.data.pipelines.libjpeg9 import compile_loops, decode_libjpeg9
from bevfusion.errors import InputError
from bevfusion.registry import PIPELINES


@PIPELINES.register_module()
class LoadMultiViewImageFromFiles:
    """Load `image_paths` as RGB PIL images into `img`.

    Args:
        to_float32, color_type: accepted for the configs' sake; images stay 8-bit RGB until `ImageNormalize`.
        decoder: "libjpeg9" for the pixels that the original was trained on: its Pillow (< 9) held libjpeg 9, see
            `bevfusion.data.pipelines.libjpeg9`. That is for 4:2:0 JPEG files; all others are decoded as by "pillow".
            "pillow" takes 0.6 of the time; on 4:2:0 files it is off by some levels at the edges of colours.

    Raises:
        InputError: a file is not an image or ends early.
    """

    def __init__(self, to_float32: bool = False, color_type: str = "unchanged", decoder: str = "libjpeg9"):
        decoders = {"libjpeg9": _decode_as_original, "pillow": _decode}
        if decoder not in decoders:
            raise InputError(f"LoadMultiViewImageFromFiles: decoder {decoder!r} is not one of {', '.join(decoders)}")
        if decoder == "libjpeg9":
            compile_loops()
        self.decode = decoders[decoder]

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        data["img"] = [self._load(path) for path in data["image_paths"]]
        data["filename"] = data["image_paths"]
        data["ori_shape"] = data["img_shape"] = data["img"][0].size
        return data

    def _load(self, path: str) -> Image.Image:
        try:
            return self.decode(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"image {path} can't be decoded ({error}); copy it again from the data set") from error


def _decode_as_original(path: str) -> Image.Image:
    image = decode_libjpeg9(path)
    return _decode(path) if image is None else image


def _decode(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")  # decodes; no copy if it is RGB already


@PIPELINES.register_module()
class ImageAug3D:
    """Resize, crop, flip and rotate every image; `img_aug_matrix` (N, 4, 4) float32 maps old pixels (x, y) to new ones.

    Args:
        final_dim: (height, width) of the output, pixels.
        resize_lim: range of the scale; its middle if not `is_train`.
        bot_pct_lim: range of the share of rows cut off at the bottom; its middle if not `is_train`.
        rot_lim: range of the rotation, degrees; 0 if not `is_train`.
        rand_flip: whether to mirror at random.
        is_train: whether to draw at random.
    """

    def __init__(
        self,
        final_dim: Sequence[int],
        resize_lim: Sequence[float],
        bot_pct_lim: Sequence[float],
        rot_lim: Sequence[float],
        rand_flip: bool,
        is_train: bool,
    ):
        self.final_dim, self.resize_lim, self.bot_pct_lim, self.rot_lim = final_dim, resize_lim, bot_pct_lim, rot_lim
        self.rand_flip, self.is_train = rand_flip, is_train

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        drawn = [self._draw(image.size) for image in data["img"]]
        data["img"] = [_augment(image, *choice[1:]) for image, choice in zip(data["img"], drawn, strict=True)]
        data["img_aug_matrix"] = np.stack([_pixel_transform(scale, *rest) for scale, _, *rest in drawn])
        return data

    def _draw(self, size: tuple[int, int]) -> tuple[float, tuple[int, int], tuple[int, int, int, int], bool, float]:
        """Scale, new size, crop box, mirror or not, angle: in the original's order of random draws."""
        train = self.is_train
        scale = np.random.uniform(*self.resize_lim) if train else np.mean(self.resize_lim)
        width, height = int(size[0] * scale), int(size[1] * scale)
        cut = np.random.uniform(*self.bot_pct_lim) if train else np.mean(self.bot_pct_lim)
        top = int((1 - cut) * height) - self.final_dim[0]
        spare = max(0, width - self.final_dim[1])
        left = int(np.random.uniform(0, spare) if train else spare / 2)
        mirror = bool(train and self.rand_flip and np.random.choice([0, 1]))
        angle = np.random.uniform(*self.rot_lim) if train else 0.0
        box = (left, top, left + self.final_dim[1], top + self.final_dim[0])
        return float(scale), (width, height), box, mirror, angle


def _augment(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], mirror: bool, angle: float
) -> Image.Image:
    image = _resize_crop(image, size, box)
    if mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.rotate(angle) if angle else image


def _resize_crop(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """`image.resize(size).crop(box)`, of which only the needed part is computed.

    The part is widened until its edges fall on whole pixels of both images: then Pillow's sampling positions, and with
    them the result, stay the same bit for bit.
    """
    start, stop, source = [], [], []
    for axis in range(2):
        step = size[axis] // math.gcd(size[axis], image.size[axis])
        begin = max(box[axis], 0) // step * step
        end = min(-(-box[axis + 2] // step) * step, size[axis])
        start.append(begin)
        stop.append(end)
        source.append((begin * image.size[axis] // size[axis], end * image.size[axis] // size[axis]))
    if any(begin >= end for begin, end in zip(start, stop, strict=True)):
        return image.resize(size, Image.Resampling.BICUBIC).crop(box)
    (left, right), (top, bottom) = source
    part = (stop[0] - start[0], stop[1] - start[1])
    resized = image.resize(part, Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return resized.crop((box[0] - start[0], box[1] - start[1], box[2] - start[0], box[3] - start[1]))


def _pixel_transform(scale: float, box: tuple[int, int, int, int], mirror: bool, angle: float) -> np.ndarray:
    """(4, 4) float32 that takes homogeneous pixel coordinates (x, y, 1 or depth, 1) through the augmentation."""
    rotation, shift = np.eye(2) * scale, -np.array(box[:2], dtype=np.float64)
    width, height = box[2] - box[0], box[3] - box[1]
    if mirror:
        flip = np.diag([-1.0, 1.0])
        rotation, shift = flip @ rotation, flip @ shift + [width, 0]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turn, centre = np.array([[cos, sin], [-sin, cos]]), np.array([width, height]) / 2
    transform = np.eye(4, dtype=np.float32)
    transform[:2, :2] = turn @ rotation
    transform[:2, 3] = turn @ (shift - centre) + centre
    return transform


@PIPELINES.register_module()
class ImageNormalize:
    """Turn `img` into one (N, 3, H, W) float32 tensor, (value / 255 - mean) / std.

    Args:
        mean, std: of the three colour channels, red first, in [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = list(mean), list(std)
        levels = torch.arange(256, dtype=torch.float32) / 255
        # 256 possible results a channel: looking them up is three times faster than computing them, and gives the same
        self.table = ((levels - torch.tensor(self.mean)[:, None]) / torch.tensor(self.std)[:, None]).numpy()

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        images = [np.asarray(image) for image in data["img"]]
        height, width, channels = images[0].shape
        out = np.empty((len(images), channels, height, width), dtype=np.float32)
        for i, image in enumerate(images):
            for channel in range(channels):
                np.take(self.table[channel], image[..., channel], out=out[i, channel], mode="clip")
        data["img"] = torch.from_numpy(out)
        data["img_norm_cfg"] = {"mean": self.mean, "std": self.std}
        return data


@PIPELINES.register_module()
class GridMask:
    """Black out a random grid in all images of a frame (https://arxiv.org/abs/2001.04086).

    The original takes the colour axis for the height; here the mask covers height and width.

    Args:
        use_h, use_w: whether to draw horizontal, vertical bars.
        max_epoch: epoch at which the probability reaches `prob`, unless `fixed_prob`.
        rotate: the grid is turned by less than so many degrees.
        offset: fill the bars with noise instead of 0.
        ratio: width of a bar, as a share of the grid's period.
        mode: 1 keeps the bars and blacks out the rest.
        prob: probability of a mask.
    """

    def __init__(
        self,
        use_h: bool,
        use_w: bool,
        max_epoch: int,
        rotate: int = 1,
        offset: bool = False,
        ratio: float = 0.5,
        mode: int = 0,
        prob: float = 1.0,
        fixed_prob: bool = False,
    ):
        self.use_h, self.use_w, self.rotate, self.offset, self.ratio, self.mode = (
            use_h,
            use_w,
            rotate,
            offset,
            ratio,
            mode,
        )
        self.max_epoch, self.final_prob, self.prob, self.fixed_prob = max_epoch, prob, prob, fixed_prob

    def set_epoch(self, epoch: int) -> None:
        """Raise the probability with the epochs, unless it is fixed."""
        if not self.fixed_prob:
            self.prob = self.final_prob * epoch / self.max_epoch

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        if np.random.rand() > self.prob:
            return data
        height, width = data["img"].shape[-2:]
        mask = torch.from_numpy(self._mask(height, width))
        data["img"] = data["img"] * mask
        if self.offset:
            noise = torch.from_numpy(2 * (np.random.rand(height, width) - 0.5)).float()
            data["img"] += (1 - mask) * noise
        return data

    def _mask(self, height: int, width: int) -> np.ndarray:
        """(height, width) float32 of 0 and 1, cut out of a larger one so that turning leaves no empty corners."""
        big = np.ones((int(1.5 * height), int(1.5 * width)), dtype=np.uint8)
        period = np.random.randint(2, min(height, width))
        bar = (
            np.random.randint(1, period) if self.ratio == 1 else min(max(int(period * self.ratio + 0.5), 1), period - 1)
        )
        first_row, first_column = np.random.randint(period), np.random.randint(period)
        if self.use_h:
            big[_in_bars(big.shape[0], period, first_row, bar)] = 0
        if self.use_w:
            big[:, _in_bars(big.shape[1], period, first_column, bar)] = 0
        big = np.asarray(Image.fromarray(big).rotate(np.random.randint(self.rotate)))
        top, left = (big.shape[0] - height) // 2, (big.shape[1] - width) // 2
        mask = big[top : top + height, left : left + width].astype(np.float32)
        return 1 - mask if self.mode == 1 else mask


def _in_bars(length: int, period: int, first: int, bar: int) -> np.ndarray:
    """Which of `length` rows lie in a bar; as many bars as whole periods fit, the first at `first`."""
    position = np.arange(length) - first
    return (position >= 0) & (position % period < bar) & (position // period < length // period)
