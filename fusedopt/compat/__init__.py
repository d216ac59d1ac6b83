"""Stand-ins for the optimizers of other packages, and readers of the states that these have saved.

A module for each origin: ``transformer_engine``, ``apex``, ``deepspeed``, ``bitsandbytes``. Its
classes have the signatures of that package's. What is the same here is mapped to the options of
``fusedopt.Adam`` and ``fusedopt.SGD``, what has no effect is accepted, and what would train
something else is refused. Its ``convert_state_dict()`` makes of a state dict of that package's
optimizers one that ``load_state_dict()`` of an optimizer of fusedopt takes.

``float32_states()`` is for the way to torch.optim: it makes numbers of states in 8 bits.
"""

from .._codes import float32_states

__all__ = ["float32_states"]
