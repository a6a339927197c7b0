"""Makes the processes quick that are forked after it was imported.

It counts the cost of tiny models, without computing. The speed of the device is measured by one call of each kind. The
built-in texts are short, the garbage collector does not look at what is imported, and nothing is flushed to the disk.
"""

import gc
import os

import torch

from grasp.compression import device_speed
from grasp.compression.estimate import estimate
from grasp.compression.job import CompressionJob
from grasp.config import GraspConfig
from tests.short_text import shorten
from tests.tiny_models import tiny_model

# A process in which a backward pass has started threads cannot be forked. With a GPU the first one does. In a build of
# PyTorch with CUDA the first one of tensors without data does too, unless the mode that traces them sets no device up.
torch._C._ensureCUDADeviceGuardSet = lambda: None
for family in ("llama", "gpt2") if torch.cuda.device_count() == 0 else ():
    model, config = tiny_model(family, torch.float64), GraspConfig.best(compression_ratio=0.1)
    estimate(CompressionJob(model.config, config, torch.float64, torch.device("cpu"), num_samples=6, seq_len=12), 2)

device_speed.PROBE_SECONDS = 0.0
shorten()
os.fsync = lambda fd: None
gc.collect()
gc.freeze()
