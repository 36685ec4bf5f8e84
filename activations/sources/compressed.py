"""Compressed files, opened as what is in them."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from activations.errors import InputError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

_CHUNK = 1 << 16


@contextmanager
def open_compressed(path: Path) -> Iterator[IO[bytes]]:
    """The content of a file, decompressed as its last suffix says; as it is where that names no compression.

    Raises:
        InputError: (inside the block too) the file is truncated or not compressed in this way.
    """
    import zstandard

    try:
        with _open(path) as file:
            yield file
    except EOFError:
        raise InputError(f"{path} is truncated: its compressed data end too early, copy it again.") from None
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"{path} is no sound {path.suffix} file ({error}): copy it again.") from None
    except OSError as error:
        if path.suffix == ".bz2" and error.errno is None:  # how bz2 says that the data are not its own
            raise InputError(f"{path} is no sound .bz2 file ({error}): copy it again.") from None
        raise


def _open(path: Path) -> IO[bytes]:
    kinds: dict[str, Callable[[Path], Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
        ".zst": lambda path: io.BufferedReader(_ZstdFile(path), _CHUNK),
    }
    opened: IO[bytes] = kinds[path.suffix](path) if path.suffix in kinds else path.open("rb")
    return opened


class _ZstdFile(io.RawIOBase):
    """All frames of a .zst file; zstandard's own reader takes a truncated file for a whole one."""

    def __init__(self, path: Path):
        import zstandard

        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._file = path.open("rb")
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._file.read(_CHUNK)
            if not data:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._ready = self._decompress(data)
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompress(self, data: bytes) -> bytes:
        content = b""
        while data:
            if self._frame is None:
                self._frame = self._new_frame()
            content += self._frame.decompress(data)
            data = b""
            if self._frame.eof:
                data, self._frame = self._frame.unused_data, None
        return content
