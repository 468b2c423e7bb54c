"""Runs an example as its file, but for DeepSpeed's shared-memory all-reduce, which a CPU would compile for a minute."""

import runpy
import sys

import deepspeed

if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
