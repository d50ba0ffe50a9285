"""`python -m molae_compress` is the command `molae-compress`."""

from molae_compress.cli import main

if __name__ == "__main__":
    main(prog_name="molae-compress")
