"""``python -m transfer``: user errors are one sentence and an exit code, never a traceback."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; exit codes 0 done, 2 user error, 3 failed but resumable, 130 interrupted."""
    # Hub look-ups by accident are slow and leak what is being worked on; thread pools oversubscribe small machines.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("POT_BACKEND_DISABLE_PYTORCH", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("WANDB_MODE", "disabled")
    from transfer.cli import app
    from transfer.core.console import close_output, complain
    from transfer.core.env import check_imports
    from transfer.core.errors import StageError, TransferError

    try:
        check_imports()
        app()
    except StageError as error:
        complain(f"failed: {error}")
        sys.exit(3)
    except TransferError as error:
        complain(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        complain("interrupted; finished work is kept, run the same command again to go on")
        sys.exit(130)
    except OSError as error:
        if error.errno is None:
            raise
        if error.filename is None:
            close_output()  # else the interpreter fails once more as it ends
        place = f": {error.filename}" if error.filename else " for standard output or the runs folder"
        complain(f"error: {error.strerror}{place}. Free some space, or choose another file or folder.")
        sys.exit(2)


if __name__ == "__main__":
    main()
