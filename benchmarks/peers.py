"""Virtual environments for the libraries that we measure ourselves against or exchange files with.

Each lives in a folder of its own under ``benchmarks/.venvs/`` (their pins contradict ours: SAELens wants
transformer-lens below 4), is made on first use and reused afterwards. Usage::

    python benchmarks/peers.py [PEER]     # make the environments, print the path of each one's python
"""

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

PEERS = {
    "sae-lens": "6.54.12",
    "dictionary-learning": "0.1.0",
    "eai-sparsify": "1.3.3",
    "sae-dashboard": "0.8.0",
}
# What pip is asked for where the name and version alone will not do: dictionary-learning reads language models with
# nnsight, which brings a torchvision of another torch. Training, encoding and its files need these only. SAEDashboard
# wants numpy 1, which newer releases of pyarrow do not.
INSTEAD = {
    "dictionary-learning": ("--no-deps dictionary-learning==0.1.0", "einops tqdm numpy safetensors"),
    "sae-dashboard": ("sae-dashboard==0.8.0 pyarrow<20",),
}
CACHE = Path(__file__).parent / ".venvs"


def peer_python(peer: str, cache: Path = CACHE) -> Path:
    """The Python interpreter of an environment that holds one of ``PEERS`` and the same release of torch as ours.

    Installing takes some minutes and up to 2 GB on the first call.

    Raises:
        subprocess.CalledProcessError: pip failed; an unfinished environment is not reused.
    """
    torch = importlib.metadata.version("torch").partition("+")[0]
    folder = cache / f"{peer}-{PEERS[peer]}-torch-{torch}"
    return environment(folder, f"torch=={torch}", *INSTEAD.get(peer, [f"{peer}=={PEERS[peer]}"]))


def environment(folder: Path, *requirements: str) -> Path:
    """The Python of a virtual environment at ``folder`` after one call of pip with the words of each requirement.

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
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirement.split()], check=True)
        finished.touch()
    return python


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "peers", nargs="*", choices=[[], *PEERS], metavar="PEER", help="which of them; all by default"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the environments lie")
    arguments = parser.parse_args()
    for name in arguments.peers or PEERS:
        print(peer_python(name, arguments.cache))
