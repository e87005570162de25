"""One worker: `python -m controlplane.workers NUMBER LISTENING CHANNEL`, the last two being inherited descriptors."""

from __future__ import annotations

import os
import socket
import sys

from loguru import logger

from controlplane import app, logs
from controlplane.settings import Settings, SettingsError


def main() -> int:
    number, listening, channel = map(int, sys.argv[1:])
    try:
        settings = Settings.load(os.environ)
    except SettingsError as error:  # a file with a secret has changed since the supervisor read it
        sys.stderr.write("".join(f"error: {fault}\n" for fault in error.faults))
        return 2
    logs.configure(level=settings.log.level, form=settings.log.format, app="proxy")
    logger.configure(extra={"worker": number})
    return app.serve_worker(settings, socket.socket(fileno=listening), socket.socket(fileno=channel))


if __name__ == "__main__":
    sys.exit(main())
