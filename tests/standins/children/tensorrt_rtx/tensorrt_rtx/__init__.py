"""Found on a child process's path: hands over to the stand-in."""

import sys

from tests.standins.environment import tensorrt_module

sys.modules[__name__] = tensorrt_module("tensorrt_rtx")
