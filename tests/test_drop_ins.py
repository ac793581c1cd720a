"""The drop-ins that install.py puts in place: they start the launchers from everywhere, or say why not."""

import os
import shutil
import subprocess
import sys

import pytest
import rig
from rig import frontend, installing, product
from rig.installing import MINIMAL, ODD, OLD, Home, copy_of_tunnel

import install

this_machine_is_left_alone = installing.this_machine_is_left_alone


@pytest.fixture
def installed(tmp_path, desk):
    """A home with blanks in its path, where the old shell scripts were, and Tunnel now is."""
    home = Home(tmp_path / "my home")
    folder = home.path / ".Mathematica" / "FrontEnd"
    folder.mkdir(parents=True)
    for name in ("tunnel.sh", "tunnel_sub.sh"):
        (folder / name).write_bytes(OLD)
        (folder / name).chmod(0o755)
    assert home.install("--front-end") == 0
    desk.folder = folder
    return folder


def login_script(desk, machine, role, installed, environment, host=None):
    """Launch as a front end does: the configuration's command, through the shell, with a minimal PATH."""
    end = frontend.FrontEnd(role)
    desk.front_ends.append(end)
    script = "tunnel_sub.sh" if role == "compute" else "tunnel.sh"
    kernel = machine.modern if role == "callback" else machine.classic
    command = '"{}/{}" "{}" "{}" "{}"'.format(installed, script, host or machine.destination, kernel, end.link)
    environ = dict(desk.environment(machine), PATH="/usr/bin:/bin:/usr/sbin:/sbin", HOME=str(installed))
    environ.update(environment)
    end.launcher = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environ,
        cwd="/",
        universal_newlines=True,
    )
    return end


@pytest.mark.parametrize("role", ["callback", "classic", "compute"])
def test_an_unchanged_kernel_configuration_launches(desk, machine, installed, role):
    libraries = "/opt/Wolfram/SystemFiles/Libraries/Linux-x86-64:/opt/mine"
    end = login_script(desk, machine, role, installed, {"LD_LIBRARY_PATH": libraries})
    end.accept()
    end.echo()
    end.quit()
    assert end.wait() == (0, "")
    assert "the kernel has ended" in desk.logs()[0] or role == "compute"


@pytest.mark.parametrize("linked_to", [False, True])
def test_the_drop_in_answers_the_password_prompt(desk, machine, installed, tmp_path, linked_to):
    host = "john:{}@{}".format(rig.PASSWORD, machine.address)
    os.chmod(str(installed / "tunnel.py"), 0o644)  # as on a file system without execute bits
    place = installed
    if linked_to:
        place = tmp_path / "Ort der Links"
        place.mkdir()
        (place / "tunnel_sub.sh").symlink_to(os.path.relpath(str(installed / "tunnel_sub.sh"), str(place)))
    end = login_script(desk, machine, "compute", place, {"TUNNEL_SSH": machine.make_keyless_ssh()}, host)
    end.accept()
    assert end.wait() == (0, "")


def test_the_drop_in_takes_mathematica_libraries_out_before_python_starts(tmp_path):
    seen = tmp_path / "seen"
    python = tmp_path / "it's python"
    python.write_text('#!/bin/sh\necho "${{LD_LIBRARY_PATH-unset}}" > "{}"\n'.format(seen))
    python.chmod(0o755)
    script = tmp_path / "tunnel.sh"
    script.write_text(install.drop_in("tunnel", "linux", str(python)))
    libraries = "/opt/Wolfram Research/SystemFiles/Libraries/Linux-x86-64"
    for given, kept in (
        (libraries, "unset"),
        ("/a b:" + libraries + ":/c*", "/a b:/c*"),
        ("/a", "/a"),
    ):
        subprocess.check_call(["/bin/sh", str(script)], env={"PATH": "/bin:/usr/bin", "LD_LIBRARY_PATH": given})
        assert seen.read_text() == kept + "\n"


def test_the_drop_in_says_what_to_do_when_its_python_is_gone(tmp_path):
    script = tmp_path / "tunnel_sub.sh"
    script.write_text(install.drop_in("tunnel_sub", "linux", "/no/such\\nice/it's python3"))
    done = rig.run("/bin/sh", str(script), "host", "kernel", "link")
    assert done.returncode == 69
    assert done.stderr.endswith("is gone (/no/such\\nice/it's python3); run install.py again\n")
    (log,) = (tmp_path / "Logs").glob("*.log")
    assert log.read_text() == done.stderr


@pytest.fixture
def linked(tmp_path):
    """A drop-in below a folder with blanks and letters beyond ASCII, with a Python that only says what it gets:
    the folder and ``TUNNEL_DROPIN``. ``readlink`` takes no options, as on macOS before 12.3."""
    tools = tmp_path / "tools"
    tools.mkdir()
    readlink = tools / "readlink"
    readlink.write_text('#!/bin/sh\n[ $# = 1 ] && exec {} "$1"\nexit 1\n'.format(shutil.which("readlink")))
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n%s" "$4" "$TUNNEL_DROPIN"\n')
    front_end = tmp_path / "Möbel und {}".format(ODD) / "FrontEnd"
    front_end.mkdir(parents=True)
    script = front_end / "tunnel.sh"
    script.write_text(install.drop_in("tunnel", "linux", str(python)))
    for path in (readlink, python, script):
        path.chmod(0o755)
    places = [tmp_path / "ein Ort" / "ö", tmp_path / "bin"]
    for place in places:
        place.mkdir(parents=True)
    (places[0] / "absolute").symlink_to(script)
    (places[0] / "relative link").symlink_to(os.path.relpath(str(script), str(places[0])))
    (places[1] / "chain").symlink_to("../ein Ort/ö/relative link")
    (tmp_path / "folder").symlink_to(places[1])
    return front_end


@pytest.mark.parametrize(
    "place, command",
    [
        (".", ["Möbel und {}/FrontEnd/tunnel.sh".format(ODD)]),
        ("Möbel und {}/FrontEnd".format(ODD), ["./tunnel.sh"]),
        ("Möbel und {}/FrontEnd".format(ODD), ["sh", "tunnel.sh"]),
        ("/", ["{}/ein Ort/ö/absolute"]),
        ("/", ["{}/ein Ort/ö/relative link"]),
        ("ein Ort/ö", ["./relative link"]),
        ("ein Ort/ö", ["sh", "relative link"]),
        ("ein Ort", ["ö/relative link"]),
        ("/", ["{}/bin/chain"]),
        ("/", ["{}/folder/chain"]),
        (".", ["folder/chain"]),
        ("/", ["chain"]),
        ("/", ["bash", "chain"]),
        ("folder", ["bash", "chain"]),
    ],
)
def test_the_drop_in_works_from_everywhere(tmp_path, linked, place, command):
    tools = str(tmp_path / "tools")
    shells = {name: shutil.which(name) for name in ("sh", "bash")}
    command = [shells.get(word) or word.replace("{}", str(tmp_path)) for word in command]
    environ = {"PATH": "{}:{}/bin".format(tools, tmp_path)}
    if command[0] == "chain":
        command = ["/usr/bin/env"] + command  # which looks along PATH
    done = rig.run(*command, env=environ, cwd=str(tmp_path / place))
    assert done.stderr == ""
    folder, script = done.stdout.split("\n")
    assert os.path.realpath(folder) == str(linked)
    assert os.path.isabs(script)
    assert os.path.realpath(script) == str(linked / "tunnel.sh")


def test_the_drop_in_logs_beside_itself_that_its_python_is_gone(tmp_path, linked):
    (tmp_path / "python").unlink()
    assert rig.run(str(tmp_path / "bin/chain"), env={"PATH": MINIMAL}).returncode == 69
    assert os.listdir(str(linked / "Logs")) == ["tunnel_no_python.log"]


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
def test_the_launcher_starts_from_a_folder_with_an_odd_name(tmp_path, locale):
    home = Home(tmp_path / ODD / "Bücher")
    home.path.mkdir(parents=True)
    assert home.install("--front-end") == 0
    link = tmp_path / "link"
    link.symlink_to(home.path / ".Wolfram/FrontEnd/tunnel_sub.sh")
    done = rig.run(str(link), "--version", env={"PATH": MINIMAL, "LC_ALL": locale}, cwd="/")
    assert (done.returncode, done.stdout, done.stderr) == (0, "tunnel {}\n".format(product.VERSION), "")


def test_the_drop_in_ignores_modules_where_it_is_called(tmp_path, installed):
    (tmp_path / "socket.py").write_text("raise SystemExit(99)")
    (tmp_path / "select.py").write_text("raise SystemExit(99)")
    done = rig.run(str(installed / "tunnel.sh"), "--version", cwd=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "tunnel {}\n".format(product.VERSION))


def cut_short(folder):
    """Cut the byte code in ``folder`` short, as Python leaves it on a disk that runs full; returns how many."""
    found = [os.path.join(root, name) for root, _, names in os.walk(str(folder)) for name in names]
    found = [path for path in found if path.endswith(".pyc")]
    for path in found:
        os.truncate(path, os.path.getsize(path) // 2)
    return len(found)


@pytest.mark.parametrize("command", [["tunnel.sh"], ["tunnel_sub.sh"], [sys.executable, "tunnel_sub.py"]])
def test_byte_code_that_was_cut_short_is_made_anew(installed, command):
    environment = dict(os.environ, TUNNEL_SSH="/bin/true")
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def outputs():
        found = []
        for relay in ([], ["--relay"]):
            words = relay + ["host", "/k/MathKernel", "53994@127.0.0.1,39359@127.0.0.1"]
            argv = command[:-1] + [str(installed / command[-1]), "--dry-run"] + words
            done = rig.run(*argv, env=environment)
            assert (done.returncode, done.stderr) == (0, "")
            found.append(done.stdout)
        return found, {str(path): path.stat().st_size for path in installed.rglob("*.pyc")}

    said, sizes = outputs()
    assert cut_short(installed) >= 2
    assert outputs()[0] == said
    said_then, sizes_then = outputs()
    assert said_then == said
    assert len(sizes_then) >= 2
    assert all(sizes_then[name] == sizes[name] for name in sizes_then)


@pytest.mark.parametrize("role", ["callback", "compute"])
def test_a_session_goes_on_through_an_update_and_an_uninstallation(desk, machine, installed, role, tmp_path):
    home = Home(tmp_path / "my home")
    source = copy_of_tunnel(tmp_path / "next")
    for name in ("tunnel.py", "tunnel_sub.py"):
        with (source / name).open("a") as stream:
            stream.write("# the next version\n")
    end = login_script(desk, machine, role, installed, {})
    end.accept()
    assert home.install("--front-end", source=source) == 0
    assert "installed: {}".format(installed / "tunnel.py") in home.said
    end.echo()
    assert home.install("--front-end", "--uninstall") == 0
    assert not (installed / "tunnel.py").exists()
    end.echo()
    end.quit()
    assert end.wait() == (0, "")
