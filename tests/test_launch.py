"""Launches that succeed, end to end: a real sshd, the real ssh and plink."""

import os
import subprocess

import pytest
import rig
from rig.desk import make_machine
from rig.launches import clients, roles


@clients
@roles
def test_all_channels_carry_bytes_both_ways(desk, machine, client, role):
    end = desk.launch(machine, role, client=client)
    assert len(end.accept()) == (2 if role == "compute" else 6)
    end.echo()
    end.echo(300000)
    end.tell(b"!quit 0\n")
    assert end.wait() == (0, "")
    rig.wait_until(lambda: not machine.kernels(), 5)
    desk.no_process()
    assert "the kernel has called back" in desk.logs()[0]
    assert "with exit code 0" in desk.logs()[0].splitlines()[-1]


@clients
def test_the_compute_launcher_returns_before_its_kernel_ends(desk, machine, client):
    end = desk.launch(machine, "compute", client=client)
    assert end.wait() == (0, "")
    end.accept()
    end.echo()
    end.quit()
    desk.no_process()


@clients
def test_front_end_that_quits_ends_kernel_client_and_launcher(desk, machine, client):
    end = desk.launch(machine, "callback", client=client)
    end.accept()
    end.echo()
    end.quit()
    code, _ = end.wait()
    assert code == 0
    assert not machine.kernels()
    desk.no_process()


@clients
@pytest.mark.parametrize("role", ["classic", "compute"])
def test_kernel_that_ends_first_ends_client_and_launcher_though_links_stay_open(desk, machine, client, role):
    end = desk.launch(machine, role, client=client)
    end.accept()
    end.tell(b"!quit 0\n")
    assert end.wait(10)[0] == 0
    desk.no_process()
    assert end.channels  # the front end has closed none of them


@clients
def test_a_launch_starts_one_kernel_however_long_that_takes_to_boot(desk, machine, client):
    before = machine.kernel_starts()
    ends = [desk.slow(machine, role, client=client) for role in ("classic", "callback", "compute")]
    for end in ends:
        end.accept()
        end.echo()
    assert machine.kernel_starts() == before + len(ends)
    for end in ends:
        end.quit()
        assert end.wait()[0] == 0


def test_an_exit_code_of_the_kernel_is_that_of_the_launcher(desk, machine):
    end = desk.launch(machine, "classic", client="plink")
    end.accept()
    end.tell(b"!quit 7\n")
    assert end.wait(10)[0] == 7


def test_twelve_compute_kernels_at_once(desk, machine):
    ends = [desk.launch(machine, "compute") for _ in range(12)]
    for end in ends:
        assert end.wait(60)[0] == 0
        end.accept()
    for end in ends:
        end.echo()
    assert len(machine.kernels()) == 12
    for end in ends:
        end.quit()
    desk.no_process(20)
    assert not machine.kernels()


@pytest.mark.parametrize("way", ["ProxyJump", "ProxyCommand"])
def test_jump_host(request, desk, way):
    jump = make_machine(request)
    target = make_machine(request, behind=jump)
    hop = (
        "ProxyJump gate"
        if way == "ProxyJump"
        else "ProxyCommand {} gate -q -W %h:%p".format(jump.path("ssh-both"))
    )
    lines = ["Host gate", "HostName {}".format(jump.address)] + jump.client_lines
    lines += ["StrictHostKeyChecking accept-new", "Host cluster", "HostName {}".format(target.address), hop]
    lines += target.client_lines
    _, wrapper = jump.make_ssh("both", lines)
    end = desk.launch(target, "callback", host="cluster", env={"TUNNEL_SSH": wrapper})
    end.accept()
    end.echo()
    end.tell(b"!quit 0\n")
    assert end.wait()[0] == 0
    desk.no_process()


def test_kernel_paths_with_blanks_quotes_and_letters_beyond_ascii(desk, machine):
    for name in ('My $HOME `id` "Kernel" \\ Ü/MathKernel', "~/sub folder/MathKernel", "$HOME/b c/MathKernel"):
        folder = name
        for prefix in ("~/", "$HOME/"):
            if name.startswith(prefix):
                folder = os.path.join("home", name[len(prefix) :])
        full = machine.install_kernel(folder, "boot=0")
        end = desk.launch(machine, "compute", kernel=name if folder != name else full)
        end.accept()
        end.echo()
        end.quit()
        assert end.wait()[0] == 0


def test_mathematica_libraries_stay_out_of_the_client(desk, machine, tmp_path):
    seen = tmp_path / "seen"
    wrapper = machine.write(
        "ssh-env", '#!/bin/sh\necho "$LD_LIBRARY_PATH" > "{}"\nexec {} "$@"\n'.format(seen, machine.ssh), 0o755
    )
    libraries = "/opt/Wolfram/SystemFiles/Libraries/Linux-x86-64:/opt/mine"
    end = desk.launch(machine, "compute", env={"TUNNEL_SSH": wrapper, "LD_LIBRARY_PATH": libraries})
    end.accept()
    assert seen.read_text() == "/opt/mine\n"


def test_every_listener_is_on_the_loopback(desk, machine):
    before = rig.exposed_ports()
    end = desk.launch(machine, "callback")
    end.accept()
    assert rig.exposed_ports() == before
    assert rig.exposed_ports("/proc/{}/net/tcp".format(machine.server.pid)) == {machine.port}


@pytest.fixture
def agent(machine, tmp_path):
    """A running agent, and an ssh that uses it."""
    path = str(tmp_path / "agent")
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    rig.wait_until(lambda: os.path.exists(path), 5, "the agent")
    lines = [line for line in machine.client_lines if not line.startswith("IdentityAgent")]
    yield machine.make_ssh("agent", ["Host *"] + lines + ["IdentityAgent {}".format(path)])[1]
    process.terminate()
    process.wait()


def test_agent_and_compression_are_as_the_options_say(desk, machine, agent):
    asked = "Requesting authentication agent forwarding"
    for options in ((), ("-o", "Compression=no", "-o", "ForwardAgent=no")):
        end = desk.launch(machine, "classic", *options, env={"TUNNEL_SSH": agent})
        end.accept()
        (log,) = [text for text in desk.logs() if end.link in text.splitlines()[1]]
        assert (asked in log) == (not options)
        assert ("compression: none" in log) == bool(options)
