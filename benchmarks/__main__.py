"""Run a benchmark: python -m benchmarks pope --model=FOLDER --data=FILE --image_dir=FOLDER."""

from benchmarks.run import main
from common import cli

if __name__ == "__main__":
    cli.run(main)
