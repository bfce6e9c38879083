"""`python -m canopy`: the command line for launchers that take a module, such as `torchrun -m canopy`."""

from canopy.cli import main

if __name__ == "__main__":
    main()
