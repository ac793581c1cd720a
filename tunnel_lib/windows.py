"""What is done otherwise on Windows, where nothing forks, and only sockets can be waited for."""

import os
import sys

from tunnel import EX_UNAVAILABLE, Fatal, Teller
from tunnel_lib.system import in_thread


def windows_places(environ):
    """plink where the batch scripts looked, Quest's build first; on PATH; then Windows' own ssh."""
    join = os.path.join
    roots = [environ.get(name) for name in ("ProgramFiles", "ProgramFiles(x86)")]
    roots = [root for root in roots if root] or ["C:\\Program Files", "C:\\Program Files (x86)"]
    places = [join(root, "Quest Software", "PuTTY", "plinkw.exe") for root in roots]
    places += [join(root, "Quest Software", "PuTTY", "plink.exe") for root in roots]
    places += [join(root, "PuTTY", "plink.exe") for root in roots]
    places += [join(folder, "plink.exe") for folder in environ.get("PATH", "").split(os.pathsep) if folder]
    return places + [join(windows_openssh(environ), "ssh.exe")]


def windows_openssh(environ):
    return os.path.join(environ.get("SystemRoot", "C:\\Windows"), "System32", "OpenSSH")


class WindowsClient:
    """:class:`Client` on Windows, where only sockets can be waited for: threads copy the pipes to them."""

    def __init__(self, loop, argv, environment, sinks, inherit=(), watched=True, line=None, afterwards=()):
        import subprocess

        self.loop, self.sinks, self.code = loop, sinks, None
        self.source = self.sink = None
        try:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE if line else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                creationflags=0x08000000,  # CREATE_NO_WINDOW
            )
        except OSError as error:  # as for a file that is no program of this system
            text = "no SSH client: {}: it cannot be executed ({})".format(argv[0], error.strerror)
            raise Fatal(text, EX_UNAVAILABLE) from None
        self.pumps = []
        for name, pipe in (("out", self.process.stdout), ("err", self.process.stderr)):
            near = in_thread(
                lambda far, pipe=pipe: copy(lambda: os.read(pipe.fileno(), 65536), far.sendall, pipe, far)
            )
            if name == "out" and line:
                self.source = near
                continue
            self.pumps.append(near)
            loop.readers[near] = lambda name=name, near=near: self._read(name, near)
        if line:
            pipe = self.process.stdin
            self.sink = in_thread(
                lambda far: copy(lambda: far.recv(65536), lambda data: write_all(pipe, data), far, pipe)
            )

    def _read(self, name, near):
        data = near.recv(65536)
        self.sinks[name](data)
        if not data:
            del self.loop.readers[near]
            near.close()
            self.pumps.remove(near)

    def poll(self):
        if self.code is None and not self.pumps:  # the pipes are at their end
            self.code = self.process.wait()
            for each in (self.source, self.sink):
                if each:
                    each.close()
        return self.code is not None

    def end(self, force=False):
        self.process.terminate()


def copy(read, write, *closed):
    """Hand on what is read until its end, then close what is named."""
    try:
        for data in iter(read, b""):
            write(data)
    except OSError:
        pass  # the other side has gone
    for each in closed:
        each.close()


def write_all(pipe, data):
    pipe.write(data)
    pipe.flush()


def join_windows_job():
    """Put this process, and so all that it starts, into a job that ends with it, however it ends.

    Source: CreateJobObject and JOBOBJECT_EXTENDED_LIMIT_INFORMATION in Microsoft's documentation of
    kernel32; 144 and 112 are its sizes in a 64-bit and a 32-bit process.

    :returns: the job's handle, which has to stay open; None where Windows refuses
    """
    import ctypes

    kernel32 = ctypes.windll.kernel32
    kernel32.CreateJobObjectW.restype = kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    wide = ctypes.sizeof(ctypes.c_void_p) == 8
    limits = (ctypes.c_byte * (144 if wide else 112))()
    ctypes.c_uint32.from_buffer(limits, 16).value = 0x2000  # JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
    job = ctypes.c_void_p(kernel32.CreateJobObjectW(None, None))
    done = kernel32.SetInformationJobObject(job, 9, limits, len(limits))
    this = ctypes.c_void_p(kernel32.GetCurrentProcess())
    return job if done and kernel32.AssignProcessToJobObject(job, this) else None


def detach_on_windows(path, argv):
    """:func:`detach` where nothing forks: the script starts itself again, without a console. The arguments
    go through a pipe, since others may read those of a process."""
    import json
    import subprocess

    child = subprocess.Popen(
        [sys.executable, "-Es", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ, TUNNEL_DETACHED="1"),
        creationflags=0x08000000,  # CREATE_NO_WINDOW
    )
    child.stdin.write(json.dumps(argv).encode("ascii"))
    child.stdin.close()
    return Teller.hear(child.stdout.read())


def detached_arguments():
    """The arguments that ``detach_on_windows`` has sent."""
    import json

    del os.environ["TUNNEL_DETACHED"]
    return json.loads(sys.stdin.buffer.read().decode("ascii"))


def temporary_file(data):
    """A file of this user's with ``data`` in it; returns its path."""
    import tempfile

    descriptor, path = tempfile.mkstemp(prefix="tunnel-")
    os.write(descriptor, data)
    os.close(descriptor)
    return path


def which_on_windows(name, environ, folders):
    """Where a program may lie: in PuTTY's folders, in those of ``PATH``, or where Windows has its own ssh."""
    if name == "plink":
        return windows_places(environ)[:-1]
    name = name if name.lower().endswith(".exe") else name + ".exe"
    return [os.path.join(folder, name) for folder in folders + [windows_openssh(environ)]]


def temporary_folder(environ):
    """A folder for what is temporary; made when missing."""
    path = os.path.join(environ.get("TEMP") or environ.get("TMP") or "C:\\Temp", "tunnel")
    os.makedirs(path, exist_ok=True)
    return path
