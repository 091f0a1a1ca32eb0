"""Splits by group, pinned by hash: a row's side depends on its group and the seed alone, never on row order."""

import hashlib
from collections.abc import Iterable

from medlora.data.sources import Record
from medlora.errors import DataError


def split(records: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, valid), with about `fraction` of the groups in valid.

    Raises:
        DataError: one side would be empty.
    """
    if fraction == 0:
        return records, []
    valid = [record for record in records if _share(record.group, seed) < fraction]
    train = [record for record in records if _share(record.group, seed) >= fraction]
    if not train or not valid:
        groups = len({record.group for record in records})
        raise DataError(
            f"{len(records)} usable row{'s' * (len(records) != 1)} in {groups} group{'s' * (groups != 1)} cannot be "
            f"split with valid_fraction {fraction:g}: {'nothing to train on' if not train else 'nothing held out'}; "
            "add rows, change data.split_seed, or set data.valid_fraction=0 to hold nothing out"
        )
    return train, valid


def refuse_overlap(train: Iterable[Record], valid: Iterable[Record]) -> None:
    """Raises DataError when a group stands on both sides, so that no held-out figure is flattered."""
    shared = {record.group for record in train} & {record.group for record in valid}
    if shared:
        example = min(shared)[:80]
        raise DataError(
            f"{len(shared)} group{'s' * (len(shared) > 1)} of data.valid_path also in data.path, for example "
            f"{example!r}; hold out whole groups, or drop data.valid_path and use data.valid_fraction"
        )


def fingerprint(records: Iterable[Record]) -> str:
    """sha256 over the records' content, in order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr((record.text, record.messages)).encode())
    return digest.hexdigest()


def _share(group: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
