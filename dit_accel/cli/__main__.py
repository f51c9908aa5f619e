"""`python -m dit_accel.cli` is `generate-video`, for launchers that start modules (torchrun)."""

from dit_accel.cli.generate import main

if __name__ == "__main__":
    main()
