"""kd in this process, which has opened its libraries already."""

import contextlib
import io
import signal
from collections.abc import Sequence

from kdcli.cli.app import main as kd


def kd_here(arguments: Sequence[str]) -> tuple[int, str]:
    """The exit code of kd, and what it printed; ^C still ends this process afterwards, though kd hears it once only.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """
    answer = signal.getsignal(signal.SIGINT)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            kd(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        signal.signal(signal.SIGINT, answer)
    if code == 130:
        raise KeyboardInterrupt
    return code, output.getvalue()
