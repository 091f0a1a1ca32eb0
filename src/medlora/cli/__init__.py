"""Command line: a thin table from command to function. Heavy imports stand inside the commands."""

import errno
import sys

import click

from medlora import __version__
from medlora.cli.ask import ask, chat
from medlora.cli.evaluate import evaluate
from medlora.cli.export import export
from medlora.cli.info import doctor, recipes
from medlora.cli.options import fail
from medlora.cli.report import compare, report
from medlora.cli.serve import serve
from medlora.cli.train import follow, train
from medlora.errors import MedloraError, ModelError


def main() -> None:
    """Entry point: one sentence and an exit code for every error that a user can cause."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        fail("stopped", 130)
    except KeyboardInterrupt:
        fail("stopped", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except MedloraError as error:
        fail(str(error), error.exit_code)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
            raise
        fail(
            "the GPU's memory is full; see nvidia-smi for who else takes it, `medlora doctor` for what fits",
            ModelError.exit_code,
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        fail(f"{error.filename or 'cannot write'}: {error.strerror}; free space or write elsewhere", 1)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Fine-tune LLaMA-family models on medical text with LoRA over a 4-bit base, and ask them questions.

    \b
    medlora train demo                      train on the embedded data (a few minutes on a CPU)
    medlora ask "What is gout?" --compare   the untuned and the tuned answer
    medlora doctor                          what this machine can train
    """


for command in (train, follow, evaluate, ask, chat, serve, report, compare, export, recipes, doctor):
    cli.add_command(command)
