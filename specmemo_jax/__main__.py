"""``python -m specmemo_jax``: the same as the ``specmemo`` command."""

from specmemo_jax.cli.main import main

if __name__ == "__main__":
    main()
