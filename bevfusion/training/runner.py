"""mmcv's epoch-based runner, told about epochs of the data, bad losses, and checkpoints that can be trusted."""

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmcv.runner import RUNNERS, EpochBasedRunner
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from bevfusion.checkpoint import read_file
from bevfusion.errors import InputError
from bevfusion.training.loader import TrainingLoader

LATEST = "latest.pth"


class DistributedModel(DistributedDataParallel):
    """A detector whose gradients are averaged over the processes, with the step that mmcv's runner calls."""

    def train_step(self, data: dict, optimizer: Optimizer | None = None) -> dict:
        """Run one training step, see `BEVFusion.train_step`."""
        return self.module.summarise(self(**data), len(data["metas"]))


@RUNNERS.register_module()
class CustomEpochBasedRunner(EpochBasedRunner):
    """Runs the epochs of a `TrainingLoader`. The name is the one that BEVFusion's configs use."""

    def train(self, data_loader: TrainingLoader, **kwargs: Any) -> None:
        """Run one epoch."""
        data_loader.set_epoch(self.epoch)
        super().train(data_loader, **kwargs)

    def run_iter(self, data_batch: dict, train_mode: bool, **kwargs: Any) -> None:
        """Run one step.

        Raises:
            InputError: the loss is not finite.
        """
        super().run_iter(data_batch, train_mode, **kwargs)
        losses = self.outputs["log_vars"]
        if not math.isfinite(losses["loss"]):
            bad = ", ".join(f"{name} {value}" for name, value in losses.items() if not math.isfinite(value))
            raise InputError(
                f"the loss is not finite in epoch {self.epoch + 1}, step {self.inner_iter + 1} ({bad}); "
                "try a lower optimizer.lr, or look for broken ground truth"
            )

    @property
    def detector(self) -> torch.nn.Module:
        """The model itself, also where it is wrapped for several processes."""
        return self.model.module if isinstance(self.model, DistributedModel) else self.model

    def save_checkpoint(
        self,
        out_dir: str,
        filename_tmpl: str = "epoch_{}.pth",
        save_optimizer: bool = True,
        meta: Mapping[str, Any] | None = None,
        create_symlink: bool = True,
    ) -> None:
        """Write weights, optimizer state and progress, all of it or nothing, as types that load without trust.

        mmcv's own function also saves buffers that are not part of the state dict, which then are unexpected.
        """
        progress = {"epoch": self.epoch + 1, "iter": self.iter, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        content = {"meta": {**(self.meta or {}), **(meta or {}), **progress}, "state_dict": self.detector.state_dict()}
        if save_optimizer:
            content["optimizer"] = self.optimizer.state_dict()
        path = Path(out_dir, filename_tmpl.format(self.epoch + 1))
        partial = path.with_name(f"{path.name}.partial")
        torch.save(content, partial)
        os.replace(partial, path)
        if create_symlink:
            link = path.with_name(LATEST)
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)

    def resume(self, checkpoint: str, resume_optimizer: bool = True, map_location: str = "cpu") -> None:
        """Continue from a checkpoint of this runner.

        Raises:
            InputError: it is none, or of another model or optimizer.
        """
        content = read_file(checkpoint)
        try:
            self.detector.load_state_dict(content["state_dict"])
            if resume_optimizer:
                self.optimizer.load_state_dict(content["optimizer"])
            self.meta = content["meta"]
            self._epoch, self._iter = self.meta["epoch"], self.meta["iter"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{checkpoint} can't be resumed from with this config ({type(error).__name__}: {reason}); "
                "to start a new run from its weights, use --load-from"
            ) from error
        self.logger.info("resumed from %s: %d epochs, %d steps", checkpoint, self.epoch, self.iter)
