"""A port on the kernel machine that somebody holds, where a kernel up to 11.0 is going to listen."""

import pytest
import rig


@pytest.mark.parametrize("client", ["ssh", "plink"])
def test_it_is_named_though_the_kernel_connects_at_once(desk, machine, client):
    kernel = machine.install_kernel("opt/quick/10.1/MathKernel", "boot=0")
    block = rig.Ports()
    release = machine.occupy(block.first + 3)
    try:
        end = desk.launch(machine, "classic", client=client, kernel=kernel, ports=(block.first, block.first + 1))
        words = "port {} is in use on the kernel machine".format(block.first + 3)
        rig.wait_until(lambda: desk.logs() and words in desk.logs()[0], 10, "the port's name in the log")
        end.signal()
        end.wait()
    finally:
        release()
        block.close()
