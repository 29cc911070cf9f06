"""What training adds to the model and the data: loading, the runner, validation between epochs."""

from bevfusion.training.loader import TrainingLoader, training_dataset
from bevfusion.training.runner import CustomEpochBasedRunner, DistributedModel
from bevfusion.training.validation import ValidationHook

__all__ = ["CustomEpochBasedRunner", "DistributedModel", "TrainingLoader", "ValidationHook", "training_dataset"]
