"""Decode processes that die or cannot hand over what they decoded: noticed and told, never waited for."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from kdcli.errors import ClaimedError, DeviceError
from kdcli.files import is_occupied, occupied
from kdcli.workers import Watched, worker_setup


class Unsendable:
    """What torch says when /dev/shm is full, in the thread that hands batches over."""

    def __reduce__(self) -> str:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left (28)")


def killed() -> object:
    os.kill(os.getpid(), signal.SIGKILL)
    return None


class One(Dataset[object]):
    def __init__(self, make: Callable[[], object]) -> None:
        self._make = make

    def __len__(self) -> int:
        return 2

    def __getitem__(self, _: int) -> object:
        return self._make()


@pytest.mark.parametrize(
    ("make", "said"), [(killed, ""), (Unsendable, "hand over a batch through /dev/shm: unable")]
)
def test_a_worker_that_is_gone_or_mute_is_noticed(
    make: Callable[[], object], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    loader = DataLoader(
        One(make), batch_size=None, num_workers=1, worker_init_fn=worker_setup(1), timeout=60
    )  # the limit is this test's
    with pytest.raises(DeviceError, match=r"decode process \d+ .*killed") as caught:
        list(Watched(loader))
    assert caught.value.exit_code == 30
    assert "--workers" in str(caught.value.hint)
    err = capfd.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_a_folder_that_another_process_is_at_work_in(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from kdcli.files import occupied\n"
        "with occupied(pathlib.Path(sys.argv[1])): print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert is_occupied(tmp_path)
        who = f"process {other.pid}" if Path("/proc/locks").exists() else "another process"
        with pytest.raises(ClaimedError, match=re.escape(f"{who} is at work")), occupied(tmp_path):
            pass
        other.kill()
    with occupied(tmp_path):  # a kill lets go of it
        assert is_occupied(tmp_path)
    assert not list(tmp_path.iterdir())
