"""Virtual environments for the libraries that we measure ourselves against or exchange files with.

Each lives in a folder of its own under ``benchmarks/.venvs/`` (their pins contradict ours: SAELens wants
transformer-lens below 4), is made on first use and reused afterwards. Usage::

    python benchmarks/peers.py            # make the environment, print the path of its python
"""

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

SAELENS = "6.54.12"
CACHE = Path(__file__).parent / ".venvs"


def saelens_python(cache: Path = CACHE) -> Path:
    """The Python interpreter of an environment that holds SAELens and the same release of torch as ours.

    Installing takes some minutes and 2 GB on the first call.

    Raises:
        subprocess.CalledProcessError: pip failed; an unfinished environment is not reused.
    """
    torch = importlib.metadata.version("torch").partition("+")[0]
    return environment(cache / f"saelens-{SAELENS}-torch-{torch}", f"torch=={torch}", f"sae-lens=={SAELENS}")


def environment(folder: Path, *requirements: str) -> Path:
    """The Python of a virtual environment at ``folder`` that holds ``requirements``, installed one after another.

    torch comes first so that pip takes the build its own configuration names (a CPU one where there is no GPU)
    before another package's requirement can choose a different one.
    """
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    finished = folder / "finished"
    if not finished.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for requirement in requirements:
            print(f"installing {requirement} into {folder}", file=sys.stderr, flush=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", requirement], check=True)
        finished.touch()
    return python


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the environments lie")
    print(saelens_python(parser.parse_args().cache))
