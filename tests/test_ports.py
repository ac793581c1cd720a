"""Ports that somebody else holds, on either machine: another block is taken, and in the end that is said."""

import re

import pytest
import rig
from rig import frontend
from rig.launches import clients, ends_with, log_of, patched, tries


@clients
@pytest.mark.parametrize("side", ["front end", "kernel machine"])
def test_a_taken_port_is_replaced_by_another_block(desk, machine, client, side):
    end = frontend.FrontEnd("classic")
    data, message = (listener.getsockname()[1] for listener in end.main)
    end.close_listeners()
    if side == "front end":
        held = frontend.listening_pair("127.0.0.1", (max(data, message) + 2, 0))
        release = [each.close for each in held]
    else:
        release = [machine.occupy(data)]
    before = machine.kernel_starts()
    try:
        end = desk.launch(machine, "classic", client=client, ports=(data, message))
        end.accept()
        end.echo()
        log = desk.logs()[0]
        assert "try 2:" in log
        assert "the next block of ports is" in log
        end.tell(b"!quit 0\n")
        assert end.wait()[0] == 0
        if client == "ssh":  # plink has the kernel run all the same, and is ended then
            assert machine.kernel_starts() == before + 1
    finally:
        for each in release:
            each()


def test_ports_at_the_end_of_the_range_draw_another_block_at_once(desk, machine):
    end = desk.launch(machine, "callback", ports=(65530, 65531))
    end.accept()
    end.echo()
    log = desk.logs()[0]
    assert "try 2:" not in log
    first = re.search(r"-R 127\.0\.0\.1:(\d+):", log)
    assert 10000 <= int(first.group(1)) < 32768


@pytest.mark.parametrize("client, position", [("ssh", 1), ("plink", 4)])
def test_a_port_that_the_kernel_would_listen_on_is_noticed_before_it_boots(desk, machine, client, position):
    block = rig.Ports()
    release = machine.occupy(block.first + 1 + position)
    try:
        end = desk.slow(machine, "classic", client=client, ports=(block.first, block.first + 1))
        desk.accept(end)
        end.echo(1000)
    finally:
        release()
        block.close()
    log = log_of(desk, end)
    assert "port {} is in use on the kernel machine".format(block.first + 1 + position) in log
    assert log.count("the kernel has called back") == 1
    assert tries(log) == 2


def test_blocks_that_are_all_held_are_explained(desk, machine):
    """Each block has a port that somebody answers at: then there is no sixth try."""
    block = rig.Ports()
    release = machine.occupy(block.first + 2)
    end = patched(
        desk,
        machine,
        "classic",
        {
            "draw_ports": "lambda: ({0}, {0} + 1)".format(block.first),
            "first_ports": "lambda _: ({0}, {0} + 1)".format(block.first),
            "Probe.PATIENCE": 0.3,
        },
    )
    try:
        ends_with(desk, end, 255, "5 blocks of ports were tried, and each had one in use", 30)
    finally:
        release()
        block.close()
    rig.wait_until(lambda: not machine.kernels(), 5)
