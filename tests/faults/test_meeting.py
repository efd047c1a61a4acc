"""Ranks that cannot meet: the port answers nothing or nonsense, a rank is missing. Each ends in time, with a line."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from rank_processes import Rank, rank_environment, run_pretrain
from torch.distributed import TCPStore

TIMEOUT_SECONDS = 1.0
ENDS_WITHIN_SECONDS = 30.0
ANSWERS = {"silent": b"", "nonsense": b"HTTP/1.1 400 Bad Request\r\n\r\n" * 50, "hangs up": None}


@contextlib.contextmanager
def something_else(answer: bytes | None) -> Iterator[int]:
    """A port on which another program gives `answer`; None: it closes every connection."""
    server, connections = socket.create_server(("127.0.0.1", 0)), []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connections.append(server.accept()[0])
                if answer is None:
                    connections.pop().close()
                else:
                    connections[-1].sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    server.close()


@contextlib.contextmanager
def a_store() -> Iterator[int]:
    """The port of the launcher's store, at which rank 0 does not come."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port


def _short_patience() -> None:
    import pretrain_k2
    from k2_megatron.runtime import groups

    pretrain_k2.RENDEZVOUS_TIMEOUT_SECONDS = groups._OVERDUE_SECONDS = TIMEOUT_SECONDS


@pytest.mark.parametrize("what", [*ANSWERS, "a rank is missing", "no such host"])
def test_rank_that_cannot_meet_the_others_ends_in_time_and_says_where(small_config, tmp_path, what):
    with something_else(ANSWERS[what]) if what in ANSWERS else a_store() as port:
        environment = rank_environment(1, 2, port)
        if what == "no such host":
            environment["MASTER_ADDR"] = "no-such-host.invalid"
        arguments = [str(small_config), "--set", "parallel.pipeline=2", "--set", f"run.folder={tmp_path / 'run'}"]
        began = time.monotonic()
        ended = Rank(run_pretrain, (arguments, _short_patience), environment, tmp_path).finish(ENDS_WITHIN_SECONDS)
    assert ended.exit_code == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"rank 1 of 2 at {environment['MASTER_ADDR']}:{port} did not meet the others (")
    assert last.endswith("; start again, and if it is so again look whether every rank was started, and what else uses "
                         "that port")  # fmt: skip
    assert "Traceback" not in ended.stderr
    print(f"{time.monotonic() - began:.1f} s: {last}")
    assert not (tmp_path / "run").exists()
