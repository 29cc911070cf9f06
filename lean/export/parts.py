"""The dense parts of the detector as the runtime cuts it: modules whose forward is what a file computes.

They are composed of the detector's own submodules, which are found by name (`encoders.camera`, `fuser`, `decoder`,
`heads.object`), and hold the whole detector as `model` or `parent`: that is where the files' weight names come from.
"""

import torch
from torch import Tensor, nn

from lean.errors import QuantizationError


class CameraBackbone(nn.Module):
    """Images and depth maps to the features and depth weights that are pooled into bird's-eye view."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, img: Tensor, depth: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute what the pooling kernel reads.

        Args:
            img: (B, N, 3, H, W) normalised images.
            depth: (B, N, 1, H, W) metres; not used where depth comes from the image alone.

        Returns:
            Features (B*N, h, w, C), channels last, and depth weights (B*N, D, h, w).
        """
        camera = self.model.encoders["camera"]
        transform = camera["vtransform"]
        x = camera["neck"](camera["backbone"](img.view(-1, *img.shape[2:])))
        x = x if isinstance(x, Tensor) else x[0]
        if depth is not None:
            x = torch.cat([transform.dtransform(depth.view(-1, *depth.shape[2:])), x], dim=1)
        x = transform.depthnet(x)
        bins, end = transform.depth_bins, transform.depth_bins + transform.context_channels
        weights = x[:, :bins].softmax(dim=1)
        return x[:, bins:end].permute(0, 2, 3, 1), weights


class Fuser(nn.Module):
    """Camera and LiDAR maps to the decoded bird's-eye view map."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.parent = model

    def forward(self, camera: Tensor, lidar: Tensor) -> Tensor:
        """Map (B, C1, X, Y) and (B, C2, X, Y) to (B, C, X, Y)."""
        decoder = self.parent.decoder
        decoded = decoder["neck"](decoder["backbone"](self.parent.fuser([camera, lidar])))
        return decoded if isinstance(decoded, Tensor) else decoded[0]


def camera_inputs(model: nn.Module, cameras: int) -> dict[str, Tensor]:
    """Example inputs of `CameraBackbone` by name, one frame of `cameras` images, float32 on the CPU."""
    transform = model.encoders["camera"]["vtransform"]
    height, width = transform.image_size
    inputs = {"img": torch.rand(1, cameras, 3, height, width)}
    if hasattr(transform, "dtransform"):
        inputs["depth"] = 50 * torch.rand(1, cameras, 1, height, width)
    return inputs


def pooled_map(model: nn.Module) -> Tensor:
    """An example of the pooled camera map (1, C, X, Y), the input of `vtransform.downsample`."""
    transform = model.encoders["camera"]["vtransform"]
    columns, rows, levels = transform.grid
    return torch.rand(1, transform.context_channels * levels, columns, rows)


def sensor_maps(model: nn.Module) -> dict[str, Tensor]:
    """Example inputs of `Fuser` by name: (1, C1, X, Y) of the camera and (1, C2, X, Y) of the LiDAR."""
    channels, *cells = pooled_map(model).shape[1:]
    for module in model.encoders["camera"]["vtransform"].downsample.modules():
        if isinstance(module, nn.Conv2d):
            channels = module.out_channels
            geometry = zip(cells, module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
            cells = [(size + 2 * pad - dilation * (k - 1) - 1) // step + 1 for size, k, step, pad, dilation in geometry]
    lidar = _fuser_channels(model.fuser, channels) - channels
    return {"camera": torch.rand(1, channels, *cells), "lidar": torch.rand(1, lidar, *cells)}


def _fuser_channels(fuser: nn.Module, camera: int) -> int:
    """Channels of both sensors together that `fuser` reads, either in one convolution or in one each."""
    convs = [module for module in fuser.modules() if isinstance(module, nn.Conv2d)]
    if convs and convs[0].in_channels > camera:
        return convs[0].in_channels
    if len(convs) > 1 and convs[0].in_channels == camera:
        return camera + convs[1].in_channels
    raise QuantizationError(f"fuser {type(fuser).__name__} does not read the camera's {camera} channels")


def check_sensors(model: nn.Module) -> None:
    """Make sure that `model` is a detector with both sensors and an object head.

    Raises:
        QuantizationError: it is something else; the runtime has no use for it.
    """
    wanted = ("encoders.camera.vtransform", "encoders.lidar.backbone", "fuser", "decoder.neck", "heads.object")
    names = {name for name, _ in model.named_modules()}
    missing = [name for name in wanted if name not in names]
    if missing:
        raise QuantizationError(f"the model has no {missing[0]!r}: the runtime needs camera, LiDAR, fuser and head")
