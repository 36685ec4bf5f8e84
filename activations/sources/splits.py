"""Which split a document belongs to."""

SPLITS = ("train", "score", "test")


def split_number(sha1: bytes) -> int:
    """Place in ``SPLITS`` of the document whose key has this sha1: its number modulo 50 is 0 for test, 1–4 score."""
    remainder = int.from_bytes(sha1, "big") % 50
    return 2 if remainder == 0 else 1 if remainder < 5 else 0
