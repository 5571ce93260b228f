"""Runs the command line from a checkout: ``python cli.py --help``."""

from moe_surgery.cli import main

if __name__ == "__main__":
    main()
