"""`python -m mmcore`: the command without its script."""

from mmcore.cli import main

if __name__ == "__main__":
    main()
