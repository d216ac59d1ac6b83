"""fusedopt in packages that train: one module for each, which imports that package.

``transformers``: a mixin for its ``Trainer``. ``lightning``: a callback. ``torchtitan``: its
container of optimizers. Here is what needs none of them. ``import fusedopt`` imports none of this.
"""

from ._averages import swap_ema

__all__ = ["swap_ema"]
