"""Reads the `.wandb` file of an offline run back, by wandb's own message types.

The file is LevelDB's log format: a header of 7 bytes, then records `crc32, length, type` within
blocks of 32 KiB; a record longer than the rest of its block goes on in the next one.
"""

from __future__ import annotations

import importlib
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
Contents = tuple[str, dict[str, Any], list[dict[str, Any]]]
"""Id of the run, its configuration, and what was logged, in order."""
_HEAD = struct.Struct("<IHB")


def messages(path: Path) -> Iterator[bytes]:
    """The records of a file, each with its checksum verified."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at + _HEAD.size <= len(data):
        left = BLOCK - at % BLOCK
        if left < _HEAD.size:
            at += left
            continue
        checksum, length, kind = _HEAD.unpack_from(data, at)
        part = data[at + _HEAD.size : at + _HEAD.size + length]
        assert zlib.crc32(bytes([kind]) + part) == checksum
        at += _HEAD.size + length
        whole = part if kind in (FULL, FIRST) else whole + part
        if kind in (FULL, LAST):
            yield whole


def read(path: Path) -> Contents:
    """What a file says."""
    internal: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    run_id, config = "", dict[str, Any]()
    logged = []
    for message in messages(path):
        record = internal.Record()
        record.ParseFromString(message)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            logged.append(
                {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
    return run_id, config, logged
