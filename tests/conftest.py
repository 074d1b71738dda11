"""One thread: on models this small a second one costs more than it brings, and very much more on a busy machine."""

import torch

torch.set_num_threads(1)
