"""What the process of a run does first to meet a fault later. A module, so that the process can import it."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import signal
import struct
from pathlib import Path
from typing import Any

from fault_calls import die_at, fail_from
from fault_runs import shorten


def killed_at(number: int) -> None:
    shorten()
    die_at(number)


def full_disk_from(number: int) -> None:
    shorten()
    fail_from(number, errno.ENOSPC)


def ignore_interrupts() -> None:
    shorten()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def full_stdout() -> None:
    shorten()
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def broken_pipe() -> None:
    shorten()
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


def full_stderr() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)


def limit_files() -> None:
    shorten()
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))


def without_privileges() -> None:
    """Drop root's capabilities, so that permissions count for it as for anyone else."""
    shorten()
    if os.geteuid() == 0:
        version, this_process = 0x20080522, 0  # linux/capability.h
        system = ctypes.CDLL(None, use_errno=True)
        if system.capset(struct.pack("Ii", version, this_process), bytes(24)) != 0:
            raise OSError(ctypes.get_errno(), "cannot drop capabilities")


def as_rank(rank: int, port: int, killed_at: int | None) -> None:
    shorten()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", **place})
    if killed_at is not None and rank == 0:
        die_at(killed_at)


def stop_after_an_epoch(copy: Path) -> None:
    """Have a run end after its first epoch, and leave its checkpoint in `copy`."""
    from kddp_ext.workflow import runs

    save = runs.save_checkpoint

    def once(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        shutil.copy(path, copy)
        raise SystemExit(3)

    runs.save_checkpoint = once
