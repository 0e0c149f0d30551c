"""Type a prompt and read the answers of base, full and LoRA side by side, with scores: rlhf compare --run NAME."""

from rlhf.cli.compare import main
from rlhf.cli.script import run_script

if __name__ == "__main__":
    run_script(main)
