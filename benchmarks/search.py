"""How long a search over a million labelled features takes.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/search.py [--folder FOLDER] [--features 1000000]

Makes a search database of features whose labels and top tokens are random words of a vocabulary of 200,000, the
frequent ones as frequent as in text (Zipf's law), and asks for single words from the most frequent to the rarest,
prefixes of one to eight letters, typing errors, words that stand nowhere, phrases, several words, symbols and regular
expressions, each on a fresh connection. Prints the median of five times each as Markdown; those in a fresh process with
its pages dropped from the page cache (Linux) stand beside them. The database stays in FOLDER and is made only once.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from features.search import importance
from features.search_file import Entry, SearchFile
from features.terms import pieces, regex_of

WORDS = 200_000
LABEL_WORDS, TOKENS = 6, 10
RESULTS = 50
REPEATS = 5
POSITIONS = 10_000_000


def vocabulary() -> list[str]:
    """Words of 1 to 12 letters, the frequent ones shorter, each letter as frequent as in English."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlcumwfgypbvkjxqz"))
    shares = 1 / np.arange(1, 27) ** 0.7
    found: dict[str, None] = {}
    while len(found) < WORDS:
        longest = 3 + min(int(np.log2(1 + len(found))), 9)
        n = int(random.integers(1, longest + 1))
        found["".join(random.choice(letters, n, p=shares / shares.sum()))] = None
    return list(found)


def entries(n: int, words: list[str]) -> Iterator[Entry]:
    """Random features; a note on one in a thousand."""
    random = np.random.default_rng(1)
    names = np.array(words, dtype=object)
    for start in range(0, n, 10_000):
        some = min(10_000, n - start)
        # The inverse of the distribution function of a law 1 / rank.
        ranks = (WORDS ** random.random((some, LABEL_WORDS + TOKENS))).astype(np.int64) - 1
        scores, firings = random.random(some), (10 ** (random.random(some) * 6)).astype(np.int64)
        for i, row in enumerate(names[ranks]):
            text = "fires on ‹" + " ".join(row[:LABEL_WORDS]) + "›"
            tokens = "\n".join(row[LABEL_WORDS:])
            note = f"see {row[0]} ({row[1]})" if (start + i) % 1000 == 0 else ""
            weight = importance(float(scores[i]), int(firings[i]), POSITIONS)
            density = float(firings[i]) / POSITIONS
            yield Entry(
                start + i, weight, text, tokens, note, float(scores[i]), "tokens", "automatic", density
            )


def queries(words: list[str]) -> dict[str, list[str]]:
    """What is asked for, by kind."""
    middle = [words[rank] for rank in (0, 10, 1_000, 50_000, WORDS - 1)]
    long = next(word for word in words[1000:] if len(word) >= 9)
    return {
        "the most frequent word of all": ["fires"],
        "words, frequent to rare": middle,
        "prefixes of one letter": ["e*", "q*", "f*"],
        "prefixes of two to four letters": ["fi*", "fir*", "fire*", "ta*", "tat*", "tate*"],
        "longer prefixes": [f"{long[:n]}*" for n in (5, 6, 8)],
        "typing errors": [long[:3] + "z" + long[4:], long[1:], long[:4] + long[5:], "fiers", "xires"],
        "words that stand nowhere": ["qqqqqqqqqq", "zxzxzx", "‹→→›"],
        "phrases and several words": [
            '"fires on"',
            "fires on",
            f"fires {words[10]}",
            f"{words[5]} {words[7]}",
        ],
        "symbols": ["(", "see ("],
        "regular expressions": [
            "/fires/",
            "/qqqqqqqqqq/",
            "/^fires on .*zzzz/",
            "/[aeiou]{9}/",
            r"/\d+/",
            "/(foo|bar)+baz$/i",
        ],
    }


def ask(file: SearchFile, query: str) -> int:
    """The number of results."""
    if regex := regex_of(query):
        return len(file.with_pattern(regex[0], RESULTS, ignore_case=regex[1]))
    return len(file.with_terms(pieces(query), RESULTS)[0])


def timed(file: SearchFile, query: str) -> tuple[float, int]:
    """Seconds and results of one search on a fresh connection."""
    start = time.perf_counter()
    n = ask(file, query)
    return time.perf_counter() - start, n


def cold(path: Path, query: str) -> float:
    """Seconds in a fresh process whose pages of the file are not in the cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    words = [sys.executable, __file__, "--folder", str(path.parent), "--ask", query]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("search-benchmark"))
    parser.add_argument("--features", type=int, default=1_000_000)
    parser.add_argument("--ask", help="print the seconds of one search, and stop")
    given = parser.parse_args()
    file = SearchFile(given.folder / "search.sqlite")
    if given.ask:
        import pyarrow.compute  # noqa: F401 (what a program loads once is no part of a search)
        import rapidfuzz.process  # noqa: F401

        print(timed(file, given.ask)[0])
        return
    words = vocabulary()
    inputs = {"features": given.features}
    if file.state(inputs) is None:
        start = time.perf_counter()
        with file.writing():
            file.build(entries(given.features, words), inputs, (0, ""))
        print(f"made in {time.perf_counter() - start:.0f} s")
    size = file.path.stat().st_size / given.features
    print(f"{given.features:,} features, {size:,.0f} bytes each, {WORDS:,} words\n")
    print("| query | results | warm, ms | cold, ms |\n|---|---|---|---|")
    for kind, group in queries(words).items():
        print(f"| **{kind}** | | | |")
        for query in group:
            times = [timed(file, query) for _ in range(REPEATS)]
            warm = statistics.median(seconds for seconds, _ in times)
            shown = query.replace("|", r"\|")  # which Markdown would take for the end of a cell
            print(f"| `{shown}` | {times[0][1]} | {warm * 1e3:.1f} | {cold(file.path, query) * 1e3:.1f} |")


if __name__ == "__main__":
    main()
