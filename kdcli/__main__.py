"""``python -m kdcli``; also ``torchrun -m kdcli``."""

from kdcli.cli.app import main

if __name__ == "__main__":
    main()
