"""``python -m grasp`` is the command line."""

from grasp.cli import main

main()
