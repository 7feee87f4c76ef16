"""``python -m dmq_ao``: the command line."""

from dmq_ao.cli import main

if __name__ == "__main__":
    main()
