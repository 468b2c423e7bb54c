"""`python -m mmcore.train clip ...`, which is what `deepspeed --module mmcore.train` and torchrun start."""

import sys

from mmcore.launch import main

if __name__ == "__main__":
    main(sys.argv[1:])
