"""No folder can be written to, or the private one belongs to somebody else: kernels are launched all the same."""

import os
import shutil

import pytest
import rig


def blocked(desk):
    """The environment of a front end machine on which nothing can be written, and whose Logs are a file."""
    shutil.rmtree(str(desk.folder / "Logs"), ignore_errors=True)
    (desk.folder / "Logs").write_text("")
    return {"XDG_RUNTIME_DIR": "", "TMPDIR": "/proc"}


@pytest.mark.parametrize("client", ["ssh", "plink"])
@pytest.mark.parametrize("role", ["classic", "callback", "compute"])
def test_a_kernel_is_launched_without_a_log_and_that_is_said_once(desk, machine, role, client):
    end = desk.launch(machine, role, client=client, env=blocked(desk))
    end.accept()
    end.echo(1000)
    end.tell(b"!quit 0\n")
    code, errors = end.wait()
    assert code == 0
    assert errors.count("\n") == 1 and errors.startswith("tunnel: no log can be written (")


@pytest.mark.parametrize("options", [["--share"], ["--share", "--relay"]], ids=["share", "relay"])
def test_a_connection_of_its_own_where_the_folder_for_shared_ones_is_somebody_elses(desk, machine, options):
    """The runtime folder's path holds a blank, as no control socket's can; the other folder is a stranger's."""
    runtime = desk.temporary / "a blank"
    runtime.mkdir()
    other = "/tmp/tunnel-{}".format(os.getuid())
    before = os.path.exists(other) and os.stat(other)
    os.makedirs(other, 0o700, exist_ok=True)
    os.chown(other, 12345, -1)
    try:
        end = desk.launch(machine, "compute", *options, env={"XDG_RUNTIME_DIR": str(runtime)})
        end.accept()
        end.echo(1000)
        log = desk.logs()[0]
        end.tell(b"!quit 0\n")
        assert end.wait()[0] == 0
    finally:
        os.chown(other, before.st_uid if before else os.getuid(), -1)
        if not before:
            shutil.rmtree(other)
    assert log.count("and a private folder: this kernel gets its own connection") == 1
    rig.wait_until(lambda: not desk.processes(), 20, "the end of all processes")
