"""`nsa-hf`, the program: runs one command (commands/), prints its error, leaves with its exit code.

    nsa-hf --help
    python -m nsa_hf.recipes.cli demo

Exit codes: 0 all is well, 1 a check failed, 2 wrong input (one line says what, `--debug` shows where), 130 interrupted.
"""

from __future__ import annotations

# Everything else is imported inside `run`, which catches an early Ctrl-C.
import sys

from .exit_codes import INTERRUPTED, WRONG_INPUT


def main(arguments: list[str] | None = None) -> None:
    """The entry point: runs one command and leaves with its exit code."""
    if hasattr(sys.stdout, "reconfigure"):
        # a model writes any letter and a path has any byte, and the terminal's encoding may lack some
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Runs one command line and prints its errors; returns the exit code. `--debug` may stand anywhere."""
    try:
        import typer

        from .commands import app
        from .terminal import report
    except KeyboardInterrupt:
        return INTERRUPTED
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:  # bytes of the command line that are no text
            print(f"error: the argument {argument!r} is not UTF-8", file=sys.stderr)
            return WRONG_INPUT
    try:
        plain = [argument for argument in arguments if argument != "--debug"]
        code = app(plain, prog_name="nsa-hf", standalone_mode=False, obj=run)
        return code if isinstance(code, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:
        if "--debug" in arguments:
            import traceback

            traceback.print_exc()
        elif not report(error):
            raise
        return WRONG_INPUT


if __name__ == "__main__":
    main()
