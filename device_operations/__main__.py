"""`python -m device_operations`: the command line, where the script `device-operations` is not on the path."""

from device_operations.cli import main

if __name__ == "__main__":
    main()
