"""``python -m grasp`` is the command line."""

from grasp.cli.root import main

main()
