"""Questions that ssh asks on this machine and that have no bearing on the login."""

import subprocess

import rig
from rig.launches import works


def test_a_key_that_ssh_asks_whether_to_add_to_the_agent_is_no_reason_to_end(desk, machine, tmp_path):
    """`AddKeysToAgent ask`, where an agent runs and nobody can be asked: ssh logs in all the same."""
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(tmp_path / "agent")], stdout=subprocess.DEVNULL)
    try:
        rig.wait_until((tmp_path / "agent").exists, 5, "the agent")
        lines = ["AddKeysToAgent ask"] + machine.client_lines
        lines = [line for line in lines if not line.startswith(("IdentityAgent", "IdentitiesOnly"))]
        wrapper = machine.make_ssh("adding", ["Host *", "IdentityAgent {}".format(tmp_path / "agent")] + lines)[1]
        nobody = dict.fromkeys(("DISPLAY", "WAYLAND_DISPLAY", "SSH_ASKPASS", "SSH_ASKPASS_REQUIRE"), "")
        environ = dict(nobody, TUNNEL_SSH=wrapper, SSH_AUTH_SOCK=str(tmp_path / "agent"))
        log = works(desk, machine, roles=["classic"], env=environ)[0]
        assert "asked for something else than the password, not answered: Confirm Add key" in log
    finally:
        agent.terminate()
        agent.wait()
