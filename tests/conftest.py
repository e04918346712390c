import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():  # Triton kernels run in the interpreter; triton reads this when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # tiny tensors: threads only get in each other's way
sys.path.insert(0, str(Path(__file__).parent))
