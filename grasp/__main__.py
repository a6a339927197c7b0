"""``python -m grasp`` and the script ``grasp`` are the command line."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C while it is imported is one line too."""
    try:
        from grasp.cli.root import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
