"""``python -m kdcli``; also ``torchrun -m kdcli``."""

from kdcli.cli.app import main
from kdcli.engines.process import end_with_supervisor

if __name__ == "__main__":
    end_with_supervisor()
    main()
