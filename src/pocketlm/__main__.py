"""`python -m pocketlm` is the command line."""

from pocketlm.cli.main import main

main()
