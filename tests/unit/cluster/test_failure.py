"""torchrun's report, and which host's failure came first."""

from __future__ import annotations

from kinema.cluster.failure import Failure, culprit, reported

REPORT = """
============================================================
/env/bin/kinema FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-21_16:07:40
  host      : node2
  rank      : 9 (local_rank: 1)
  exitcode  : 1 (pid: 8111)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_16:07:33
  host      : node2
  rank      : 8 (local_rank: 0)
  exitcode  : -9 (pid: 8110)
  error_file: <N/A>
============================================================
""".splitlines()


def test_the_root_cause_is_read() -> None:
    failure = reported("node2", REPORT)
    assert failure == Failure("node2", 8, -9, "2026-11-21_16:07:33")
    assert str(failure) == "node2, rank 8 (signal 9)"
    assert reported("node1", ["nothing of the kind"]) is None


def test_a_rank_that_only_lost_another_is_not_the_culprit() -> None:
    lost = Failure("node1", 0, 1, "2026-11-21_16:07:32")
    own = Failure("node2", 8, 1, "2026-11-21_16:07:33")
    said = [(lost, ["RuntimeError: Connection closed by peer [10.0.0.2]"]), (own, ["no clip"])]
    assert culprit(said) == own
    assert culprit([(lost, ["a"]), (own, ["b"])]) == lost
    assert culprit([]) is None
