"""One thread: on models this small a second one costs more than it brings, and very much more on a busy machine."""

import signal

import torch

torch.set_num_threads(1)
# A shell that starts tests in the background has them ignore Ctrl-C, and with them the programs that they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
