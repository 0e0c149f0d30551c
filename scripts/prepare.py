"""Download all that a recipe needs, on a machine with network: rlhf prepare --recipe NAME."""

from rlhf.cli.prepare import main
from rlhf.cli.script import run_script

if __name__ == "__main__":
    run_script(main)
