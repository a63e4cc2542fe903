"""Processes that Ctrl-C ends, also where the tests run in the background, which ignores it."""

import signal
import subprocess


def _heed_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_interruptible(command, **options):
    return subprocess.Popen(command, preexec_fn=_heed_interrupts, **options)
