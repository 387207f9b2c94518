"""`python -m pocketlm` is the command line."""

from pocketlm.cli import main

main()
