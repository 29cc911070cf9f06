"""The default recipe for BEVFusion: the only place that knows the names of its modules."""

from collections.abc import Sequence

from torch import nn

from lean.matching import matches
from lean.recipe import BranchRecipe, LayerRule, Recipe, ShareRule

FLOAT_MODEL = "bevfusion.models:build_model"  # makes the float model from the config's `model`
CAMERA, LIDAR, FUSER, DECODER = "encoders.camera", "encoders.lidar.backbone", "fuser", "decoder"

HEAD_MAPS = ("heads.object.heatmap_head",)  # dense, unlike the head's boxes, whose order changes with the last bits

RESIDUAL_SHARING = (
    # One tensor feeds the first convolution and the shortcut: with one scale TensorRT quantises it once.
    ShareRule("backbone.layer{k}.{j}.conv1", ("backbone.layer{k}.{j}.downsample.0",), optional=True),
    ShareRule(
        "backbone.layer{k}.{j}.conv1",
        ("backbone.layer{k}.{j}.add",),
        unless=("backbone.layer{k}.{j}.downsample",),
        optional=True,
    ),
)


def camera_branch(out_indices: Sequence[int] = (1, 2, 3), start_level: int = 0) -> BranchRecipe:
    """Rules for image backbone, neck and depth net; `vtransform.downsample` stays float.

    Args:
        out_indices: stages (0 = `layer1`) that the backbone hands to the neck.
        start_level: the first of them that the neck uses.
    """
    necks = []
    for level, stage in enumerate(out_indices[start_level:]):
        lateral, concat = f"neck.lateral_convs.{level}.conv", f"neck.concats.{level}"
        # A stage's output is both the next stage's input and the finer input of the neck's concat.
        necks.append(ShareRule(f"backbone.layer{stage + 2}.0.conv1", (lateral,), optional=True))
        necks.append(ShareRule(lateral, (concat,), optional=True))
    return BranchRecipe(
        CAMERA,
        quantize=(
            LayerRule("backbone.*"),
            LayerRule("backbone.layer*.add", inputs="second", optional=True),
            LayerRule("neck.*"),
            LayerRule("vtransform.dtransform.*", optional=True),
            LayerRule("vtransform.depthnet*"),
        ),
        share=(*RESIDUAL_SHARING, *necks),
    )


LIDAR_BRANCH = BranchRecipe(LIDAR, quantize=(LayerRule("*"),))
FUSER_BRANCH = BranchRecipe(FUSER, quantize=(LayerRule("*"),))
DECODER_BRANCH = BranchRecipe(DECODER, quantize=(LayerRule("*"),))

# What the parts of the network hand on: where the effect of quantisation is measured.
OUTPUTS = {
    "camera": "encoders.camera",
    "lidar": "encoders.lidar",
    "fused": FUSER,
    "decoder": DECODER,
    "heatmap": "heads.object.heatmap_head",
}

DISABLED = (f"{LIDAR}.conv_input.*", f"{DECODER}.neck.deblocks.0.0")


def camera_branch_of(camera: nn.Module) -> BranchRecipe:
    """Return the camera rules that fit `camera` (children `backbone`, `neck`, `vtransform`)."""
    backbone, neck = getattr(camera, "backbone", None), getattr(camera, "neck", None)
    return camera_branch(tuple(getattr(backbone, "out_indices", (1, 2, 3))), getattr(neck, "start_level", 0))


def default_recipe(model: nn.Module) -> Recipe:
    """Return the recipe of the original for those branches and sensitive layers that `model` has."""
    names = [name for name, _ in model.named_modules()]
    branches = [branch for branch in (LIDAR_BRANCH, FUSER_BRANCH, DECODER_BRANCH) if branch.path in names]
    if CAMERA in names:
        branches.insert(0, camera_branch_of(model.get_submodule(CAMERA)))
    disable = tuple(pattern for pattern in DISABLED if any(matches(name, [pattern]) for name in names))
    return Recipe(tuple(branches), disable=disable)


def outputs_of(model: nn.Module) -> dict[str, str]:
    """Return those of `OUTPUTS` that `model` has."""
    names = {name for name, _ in model.named_modules()}
    return {output: path for output, path in OUTPUTS.items() if path in names}
