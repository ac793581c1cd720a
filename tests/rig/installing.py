"""install.py at work: homes that it installs to, on this machine and on a kernel machine."""

import os
import shutil
import sys

import pytest

import install
import rig

OLD = b"#!/bin/sh\n# the old shell script\n"
INSTALL = os.path.join(rig.LAUNCHERS, "install.py")
MINIMAL = "/usr/bin:/bin:/usr/sbin:/sbin"  # the PATH that a front end has
ODD = "it's 50% \"off\" $HOME `pwd` \\ ä * 'x'"


def tree(folder):
    """Every file and folder below ``folder``, with contents and modes."""
    found = {}
    for root, folders, names in os.walk(str(folder)):
        for name in folders:
            path = os.path.join(root, name)
            found[os.path.relpath(path, str(folder))] = None
        for name in names:
            path = os.path.join(root, name)
            if os.path.islink(path):
                found[os.path.relpath(path, str(folder))] = os.readlink(path)
                continue
            with open(path, "rb") as stream:
                found[os.path.relpath(path, str(folder))] = (stream.read(), os.stat(path).st_mode & 0o777)
    return found


@pytest.fixture(autouse=True)
def this_machine_is_left_alone(tmp_path, monkeypatch):
    """Whatever goes wrong: nobody's home is touched, nor what is for all users."""
    monkeypatch.setattr(install, "SHARE", str(tmp_path / "none") + "/")
    monkeypatch.setenv("HOME", str(tmp_path))
    for brand in install.PRODUCTS:
        for suffix in ("_USERBASE", "_BASE"):
            monkeypatch.delenv(brand.upper() + suffix, raising=False)


class Home:
    """A home on some system, and install.py for it."""

    def __init__(self, path, platform="linux", **environ):
        self.path, self.platform, self.environ, self.said = path, platform, environ, []

    def install(self, *argv, source=None):
        self.said = []
        installer = install.Installer(argv, self.platform, self.environ, str(self.path), self.said.append)
        installer.source = str(source or installer.source)
        return installer.run()


def copy_of_tunnel(folder, *names):
    """Tunnel as someone may have it elsewhere; of ``names`` only, if given."""
    folder.mkdir(parents=True)
    for name in names or ("install.py", "tunnel.py", "tunnel_sub.py", "tunnel.m"):
        shutil.copy(os.path.join(rig.LAUNCHERS, name), str(folder))
    return folder


def run_install(*argv, script=INSTALL, before="", **environ):
    """Run install.py as a user does; ``before`` is what a shell does first, ``None`` unsets a variable."""
    environ.setdefault("PYTHONUNBUFFERED", None)
    environ = {name: value for name, value in dict(os.environ, **environ).items() if value is not None}
    command = before + '; exec "$0" "$@"' if before else 'exec "$0" "$@"'
    return rig.run("sh", "-c", command, sys.executable, str(script), *argv, env=environ)


class Login:
    """The home on a kernel machine: its ssh is a program that does what sshd does with a command."""

    def __init__(self, folder, shell="/bin/sh", **environ):
        self.path = folder / "kernel home"
        self.path.mkdir()
        self.ssh = folder / "ssh"
        words = ["{}='{}'".format(name, value) for name, value in dict(environ, HOME=self.path).items()]
        self.ssh.write_text(
            '#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\ncd / && exec env -i PATH="${{KERNEL_PATH:-$PATH}}"'
            ' {} {} -c "$1"\n'.format(" ".join(words), shell)
        )
        self.ssh.chmod(0o755)
        self.said = []

    def remote(self, *argv, source=None, **environ):
        self.said = []
        environ = dict(os.environ, TUNNEL_SSH=str(self.ssh), **environ)
        installer = install.Installer(("--remote", "host") + argv, "linux", environ, "/none", self.said.append)
        installer.source = str(source or installer.source)
        code = installer.run()
        self.said = [line.partition(": ")[2] for line in self.said]
        return code

    def local(self, *argv, source=None):
        """The same on the machine itself."""
        home = Home(self.path, MATHEMATICA_USERBASE=str(self.path / ".Mathematica"))
        code = home.install("--kernel", *argv, source=source)
        self.said = home.said
        return code


def killed_after(number, action):
    """Whether ``action`` ended by itself in a process that is killed at its ``number``-th change of a file."""
    child = os.fork()
    if not child:
        left = [number]

        def counted(real):
            def call(*arguments, **options):
                left[0] -= 1
                if not left[0]:
                    os._exit(9)
                return real(*arguments, **options)

            return call

        for name in ("chmod", "rename", "replace", "remove"):
            setattr(os, name, counted(getattr(os, name)))
        action()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


LOADED = ["tunnel_relay.py", "tunnel_lib/__init__.py", "tunnel_lib/names.py", "tunnel_lib/sent/wire.py"]


def version(folder, text, *loaded):
    """A Tunnel whose scripts say ``text`` and nothing else."""
    for name in ("tunnel.py", "tunnel_sub.py", "tunnel.m") + (loaded or tuple(LOADED)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("# {}\n".format(text))
    return folder
