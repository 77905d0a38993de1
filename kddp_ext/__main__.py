"""`python -m kddp_ext` runs the command `kddp`."""

from kddp_ext.workflow.cli import entry_point

if __name__ == "__main__":
    entry_point()
