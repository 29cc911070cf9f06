"""The one exception that stands for a quantisation that can't go on."""


class QuantizationError(ValueError):
    """A model, rule, checkpoint or statistic that can't be used: says what, where, and what to do, in one line."""
