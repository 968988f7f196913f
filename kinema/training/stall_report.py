"""What is written when a run stands still: stacks, flight records, clips in hand, the culprit."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kinema.training.culprit import Evidence, Seen, judge
from kinema.training.heartbeat import PHASES, HeartbeatReader, State
from kinema.training.stacks import Stack, decode_workers, dump_stack

ANSWER_S = 3.0
"""How long a rank's own thread has to answer."""
SHOWN_CLIPS = 4


def answer_path(folder: Path, rank: int) -> Path:
    """Where a rank writes what only it knows."""
    return folder / f"answer-{rank}.json"


def flight_path(folder: Path, rank: int) -> Path:
    """Where a rank writes its record of collective operations, as JSON."""
    return folder / f"flight-{rank}.json"


def nccl_path(folder: Path, rank: int) -> Path:
    """The same of NCCL as PyTorch pickles it, under the name that `torchfrtrace` expects."""
    return folder / f"nccl_{rank}"


def fault_path(folder: Path, rank: int) -> Path:
    """What a rank's `faulthandler` writes to."""
    return folder / f"fault-{rank}.txt"


def collect(
    folder: Path,
    node: int,
    ranks: Sequence[tuple[int, int]],
    seen: Sequence[Seen],
    readers: Mapping[int, HeartbeatReader],
    private: Path,
) -> None:
    """Write what one machine knows: `rank-R.stack`, `rank-R-worker-PID.stack`,
    `flight-R.json`, `node-N.json`.

    Args:
        folder: of this stall; made where it is missing.
        ranks: (rank, process id) of this machine.
        readers: by rank; they ask.
        private: where the ranks of this machine answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for reader in readers.values():
        reader.ask()
    with ThreadPoolExecutor(8) as pool:
        stacks = {
            rank: pool.submit(dump_stack, pid, fault_file=fault_path(private, rank))
            for rank, pid in ranks
        }
        workers = {
            (rank, worker): pool.submit(dump_stack, worker)
            for rank, pid in ranks
            for worker in decode_workers(pid)
        }
        until = time.monotonic() + ANSWER_S
        waiting = [answer_path(private, rank) for rank, _ in ranks]
        while time.monotonic() < until and not all(path.exists() for path in waiting):
            time.sleep(0.05)
    own = {one.state.rank: one for one in seen if one.node == node}
    content = []
    for rank, pid in ranks:
        stack = stacks[rank].result()
        (folder / f"rank-{rank}.stack").write_text(stack.text + "\n", encoding="utf-8")
        with suppress(OSError):
            shutil.copyfile(flight_path(private, rank), flight_path(folder, rank))
            shutil.copyfile(nccl_path(private, rank), nccl_path(folder, rank))
        content.append(_entry(own.get(rank), rank, pid, stack, _answer(private, rank)))
    for (rank, worker), dumped in workers.items():
        text = dumped.result().text + "\n"
        (folder / f"rank-{rank}-worker-{worker}.stack").write_text(text, encoding="utf-8")
    temporary = folder / f".node-{node}.json"
    temporary.write_text(json.dumps({"node": node, "ranks": content}, indent=1), encoding="utf-8")
    temporary.replace(folder / f"node-{node}.json")


def _entry(
    seen: Seen | None, rank: int, pid: int, stack: Stack, answer: dict[str, Any]
) -> dict[str, Any]:
    return {
        "rank": rank,
        "pid": pid,
        "seen": None if seen is None else asdict(seen),
        "stack": stack.whole or stack.text.strip(),
        "in_collective": stack.in_collective,
        "at": stack.at,
        **answer,
    }


def _answer(private: Path, rank: int) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(answer_path(private, rank).read_text())
    except (OSError, ValueError):
        return {"enqueued": None, "started": None, "decoding": []}
    return answer


def write_report(folder: Path, seen: Sequence[Seen], missing: Sequence[int]) -> None:
    """Name the culprit from what all machines wrote: `report.json`, `report.txt`.

    Args:
        seen: all ranks as the caller saw them; what their own machines wrote counts more.
        missing: nodes that are silent.
    """
    entries: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob("node-*.json")):
        for entry in json.loads(path.read_text(encoding="utf-8"))["ranks"]:
            entries[entry["rank"]] = entry
    everyone = {one.state.rank: one for one in seen}
    for rank, entry in entries.items():
        if rank not in everyone and entry["seen"] is not None:
            one = entry["seen"]
            everyone[rank] = Seen(**one | {"state": State(**one["state"])})
    evidence = {
        rank: Evidence(
            in_collective=entry["in_collective"],
            enqueued=entry["enqueued"],
            started=entry["started"],
            at=entry["at"],
            decoding=[(pid, file, seconds) for pid, file, seconds in entry["decoding"]],
        )
        for rank, entry in entries.items()
    }
    verdict = judge(list(everyone.values()), evidence, missing)
    line = f"the run stood still: {verdict}; stacks of all processes in {folder}"
    culprit = verdict.culprit
    content = {
        "line": line,
        "culprit": None
        if culprit is None
        else {
            "rank": culprit.state.rank,
            "node": culprit.node,
            "host": culprit.host,
            "pid": culprit.state.pid,
            "phase": culprit.state.phase,
            "process": culprit.process,
            "bucket": culprit.state.bucket,
            "clips": culprit.state.clips,
        },
        "reason": verdict.reason,
        "file": verdict.file,
        "silent_nodes": list(missing),
        "ranks": [
            _rank_entry(one, entries.get(rank, {})) for rank, one in sorted(everyone.items())
        ],
    }
    text = [line, "", *(_line(one, entries.get(rank)) for rank, one in sorted(everyone.items()))]
    text += ["", "stacks: rank-R.stack, rank-R-worker-PID.stack; collectives: flight-R.json"]
    if list(folder.glob("nccl_*")):
        text.append(f"NCCL's records compared: torchfrtrace --prefix nccl_ {folder}")
    (folder / "report.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
    temporary = folder / ".report.json"
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(folder / "report.json")


def _rank_entry(one: Seen, entry: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in entry.items() if key != "seen"}
    return {**asdict(one), **kept}


def _line(one: Seen, entry: dict[str, Any] | None) -> str:
    state = one.state
    parts = [
        f"rank {state.rank} on node {one.node} ({one.host}), pid {state.pid}, {one.process}",
        f"phase {state.phase or 'after ' + PHASES[state.order]} for {one.idle_s:.0f} s "
        f"(limit {one.limit_s:.0f} s)",
        f"step {state.step}, turn {state.turn}, micro-batch {state.micro}",
    ]
    if state.count:
        names = ", ".join(state.clips[:SHOWN_CLIPS])
        more = f" and {state.count - SHOWN_CLIPS} more" if state.count > SHOWN_CLIPS else ""
        parts.append(f"{state.bucket}: {names}{more}")
    if entry is not None:
        if entry["enqueued"] is not None:
            parts.append(f"{entry['enqueued']} collectives begun")
        for pid, file, seconds in entry["decoding"]:
            parts.append(f"worker {pid} is on {file} since {seconds:.0f} s")
        if entry["stack"] is not True:
            parts.append(f"no stack: {entry['stack']}")
    return "; ".join(parts)
