"""The process that runs the kernels of many launches, when it does not do what it should."""

import os
import socket
import threading

import pytest
import rig
from rig import product, relays
from rig.launches import log_of
from rig.relays import forget

machine, desk = relays.machine, relays.desk


class FalseHub:
    """A process that stands at a hub's socket and answers each call in its own way."""

    def __init__(self, path, answer):
        self.path, self.answer, self.calls = path, answer, 0
        os.rename(path, path + ".hub")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(9)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                caller, _ = self.listener.accept()
            except OSError:
                return
            self.calls += 1
            with caller:
                if self.answer:
                    caller.recv(65536)
                    caller.sendall(self.answer)

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        os.remove(self.path)
        os.rename(self.path + ".hub", self.path)


@pytest.mark.parametrize(
    "answer, words",
    [
        (b"", "has hung up without an answer"),
        (b" nonsense \xff\xfe", "answers nonsense: "),
        (b" 99999 odd", "answers nonsense: "),
        (b" " + b"1" * 100000, "answers nonsense: "),
    ],
)
def test_a_hub_that_makes_no_sense_is_called_three_times_and_then_done_without(desk, machine, answer, words):
    product.alter(desk.folder, SHARE_SECONDS=0.7)
    first = desk.launch(machine, "compute", "--share", "--relay")
    assert first.wait(20) == (0, "")
    first.accept()
    (path,) = [str(each) for each in (desk.runtime / "tunnel").glob("*-hub")]
    false = FalseHub(path, answer)
    try:
        end = desk.launch(machine, "compute", "--share", "--relay")
        assert end.wait(20) == (0, "")
        end.accept()
        end.echo()
        assert 3 <= false.calls <= 4  # once by the launcher itself, before it goes into the background
        log = log_of(desk, end)
        assert words in log and "this kernel gets a relay of its own" in log
        end.quit()
    finally:
        false.close()
    first.quit()
    rig.wait_until(lambda: not machine.kernels(), 10, "the end of the kernels")
    forget(desk)
