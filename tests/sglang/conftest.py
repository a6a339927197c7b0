"""SGLang's CPU engine, without the kernels of its own that no package brings."""

from __future__ import annotations

import os
import sys

from tests.sglang.processes import VARIABLES, WITHOUT_KERNELS

os.environ.update(VARIABLES)
sys.path.insert(0, str(WITHOUT_KERNELS))
