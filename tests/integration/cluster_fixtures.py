"""Real ssh servers on loopback ports, each playing a host of a cluster.

    with loopback(tmp_path, "node1", "node2") as cluster:
        cluster.ssh, cluster.hosts, cluster.hostfile, cluster.config

The "hosts" share this machine's processes and disk. What differs between them is their environment
(`environment={"node2": {"PATH": ...}}`): so stand-ins of hardware tools can be put on one of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kinema.cluster.hostfile import Host, read_hostfile
from kinema.cluster.ssh import CONFIG_VARIABLE, Ssh

SSHD = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").exists() else None)
BIN = Path(sys.executable).parent

needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="OpenSSH's server is not installed here"
)


@dataclass
class Cluster:
    """Servers that run, and the files that lead to them."""

    folder: Path
    names: tuple[str, ...]
    config: Path
    """For `--ssh-config` or KINEMA_SSH_CONFIG."""
    hostfile: Path
    servers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    temporary: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="kc-"))
    """TMPDIR of the hosts; its path is short, because sockets may be put into it."""

    @property
    def ssh(self) -> Ssh:
        return Ssh(self.config)

    @property
    def hosts(self) -> list[Host]:
        return read_hostfile(self.hostfile)

    def environment(self) -> dict[str, str]:
        """For `kinema cluster ...` in a process of its own: finds the servers."""
        return os.environ | {CONFIG_VARIABLE: str(self.config), "OMP_NUM_THREADS": "1"}

    def kinema(
        self, *words: str, timeout: float = 120, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`kinema cluster WORDS --hostfile ...` in the cluster's folder."""
        return subprocess.run(
            [str(BIN / "kinema"), "cluster", *words],
            cwd=self.folder,
            env=self.environment(),
            input=stdin or "",
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def write_key(self, name: str, key: Path) -> None:
        """Make `key` the one that this side knows a host by."""
        public = key.with_suffix(".pub").read_text().split()
        others = [
            line
            for line in (self.folder / "known_hosts").read_text().splitlines()
            if not line.startswith(f"[127.0.0.1]:{self.ports[name]} ")
        ]
        line = f"[127.0.0.1]:{self.ports[name]} {public[0]} {public[1]}"
        (self.folder / "known_hosts").write_text("\n".join([*others, line, ""]))

    def stop(self, name: str) -> None:
        """Take a host off the network: its server and its connections end."""
        server = self.servers.pop(name)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def loopback(
    folder: Path,
    *names: str,
    slots: int = 1,
    environment: Mapping[str, Mapping[str, str]] | None = None,
) -> Iterator[Cluster]:
    """Servers for `names`; they and what they started end with the block.

    Args:
        folder: for keys, configuration and `nodes.txt`.
        environment: variables of sessions on single hosts; PATH among them if wanted.
    """
    assert SSHD is not None
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    make_key(folder / "key")
    (folder / "authorized_keys").write_text((folder / "key.pub").read_text())
    (folder / "known_hosts").write_text("")
    cluster = Cluster(folder, names, folder / "ssh_config", folder / "nodes.txt")
    cluster.hostfile.write_text("".join(f"{name} slots={slots}\n" for name in names))
    try:
        text = ""
        for name in names:
            _start(cluster, name, (environment or {}).get(name, {}))
            text += f"Host {name}\n  HostName 127.0.0.1\n  Port {cluster.ports[name]}\n"
        text += f"Host *\n  IdentityFile {folder}/key\n  IdentitiesOnly yes\n"
        text += f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
        cluster.config.write_text(text)
        yield cluster
    finally:
        for name in list(cluster.servers):
            cluster.stop(name)
        shutil.rmtree(cluster.temporary, ignore_errors=True)


def make_key(path: Path) -> None:
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(words, check=True, timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(cluster: Cluster, name: str, environment: Mapping[str, str]) -> None:
    assert SSHD is not None
    folder = cluster.folder
    make_key(folder / f"host-{name}")
    port = cluster.ports[name] = free_port()
    cluster.write_key(name, folder / f"host-{name}")
    # Another "host" has its own limits; what the machine's sshd_config says is not read.
    variables = {"PATH": os.environ["PATH"], "TMPDIR": cluster.temporary}
    variables |= {**environment, "KINEMA_LOOPBACK_HOST": name}
    (folder / f"sshd-{name}").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host-{name}\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPidFile none\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\nMaxStartups 100\n"
        + "SetEnv "
        + " ".join(f'"{key}={value}"' for key, value in variables.items())
        + "\n"
    )
    cluster.servers[name] = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", str(folder / f"sshd-{name}")],
        stderr=(folder / f"sshd-{name}.log").open("wb"),
        start_new_session=True,
    )
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError((folder / f"sshd-{name}.log").read_text())
