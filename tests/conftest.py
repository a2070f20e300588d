"""Without a GPU, Triton's kernels are tested in its interpreter, which has to be on before they are imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
