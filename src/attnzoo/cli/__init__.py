"""The command line: one parser, and a command of each module here when it is called; light to import."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from attnzoo.redaction import print_error, redact_output, redact_text

USAGE_ERROR, RUN_ERROR, INTERRUPTED = 2, 1, 130
TRAIN_HELP = "train a model: attnzoo train [group=choice] [key=value] [-m] [--cfg job]"


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as a ValueError instead of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Mistakes become one line on stderr, without a stack trace.

    ``--traceback`` or the environment's ``ATTNZOO_TRACEBACK=1`` show the stack trace too. Without
    ``arguments`` the process is the command's own, and prints no secret in the trace of an uncaught error.
    """
    if arguments is None:
        redact_output()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--traceback" in arguments:
        arguments.remove("--traceback")
        os.environ["ATTNZOO_TRACEBACK"] = "1"
    try:
        if arguments[:1] in (["train"], ["sweep"], ["plan"]):
            return _command(arguments[0], arguments[0])(arguments[1:])
        options = _parse(arguments)
        return options.command(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return RUN_ERROR
    except Exception as error:
        return report(error)


def report(error: Exception) -> int:
    """Print an error as one line; returns the exit code it stands for."""
    code, text = explain(error)
    print(f"error: {text}", file=sys.stderr)
    return code


def explain(error: Exception) -> tuple[int, str]:
    """The exit code that an error stands for, and its line."""
    if os.environ.get("ATTNZOO_TRACEBACK") == "1":
        print_error(error)
    code, text = RUN_ERROR, str(error)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("attnzoo"):
        text = f"a package is missing: {error.name or text}; pip install 'attnzoo[all]' brings it"
    elif isinstance(error, ValueError):
        code = USAGE_ERROR
    elif type(error).__name__ != "RunFailed":
        text = f"{type(error).__name__}: {text}; --traceback shows where"
    # before lines are put together, because a secret may have several
    return code, "; ".join(line.strip() for line in redact_text(text).splitlines() if line.strip())


def _command(module: str, name: str) -> Callable[..., int]:
    """A command whose module is imported when it runs."""
    return lambda *args: getattr(import_module(f"attnzoo.cli.{module}"), name)(*args)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options and positionals in any order: argparse ends a list of positionals where an option begins."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if more and (options.many is None or any(argument.startswith("-") for argument in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        getattr(options, options.many).extend(more)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="attnzoo", description="Attention variants for language-model pretraining.")
    parser.add_argument("--traceback", action="store_true", help="show the stack trace of an error")
    parser.set_defaults(many=None)  # of a command: the positional that takes any number
    commands = parser.add_subparsers(required=True, metavar="command")

    listing = commands.add_parser("list", help="names of the variants")
    listing.add_argument("glob", nargs="?", default="*")
    listing.add_argument("--family", help="only this family")
    listing.set_defaults(command=_command("zoo", "list_command"))

    show = commands.add_parser("show", help="card, equations and costs of a variant")
    show.add_argument("name")
    show.add_argument("--dim", type=int, default=512)
    show.add_argument("--num-heads", type=int, default=8)
    show.add_argument("--seq-len", type=int, default=1024)
    show.set_defaults(command=_command("zoo", "show_command"))

    commands.add_parser("train", help=TRAIN_HELP, add_help=False)
    commands.add_parser("sweep", help="train a grid of configurations: attnzoo sweep --help", add_help=False)
    commands.add_parser("plan", help="memory and step time on many GPUs: attnzoo plan --help", add_help=False)

    generate = commands.add_parser("generate", help="continue prompts with a trained model")
    generate.add_argument("run", help="a run folder or a checkpoint")
    generate.add_argument("--prompt", action="append", required=True, help="repeat it for several prompts")
    generate.add_argument("--max-new-tokens", type=int, default=200)
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--seed", type=int)
    generate.add_argument("--stop", action="append", default=[], help="end at this text; may be repeated")
    generate.set_defaults(command=_command("generate", "generate_command"))

    convert = commands.add_parser(
        "convert", help="turn a run's model into another variant, as a start for it"
    )
    convert.add_argument("run", help="a run folder")
    convert.add_argument("method", help="gqa, transmla, mha2mla, elitekv, xecomla, dha, tpla, tensorllm, ...")
    convert.add_argument("out", help="the new folder")
    convert.add_argument("option", nargs="*", help="key=value, of the method; see docs/conversions.md")
    convert.add_argument("--samples", type=int, default=16, help="of text for calibration")
    convert.set_defaults(command=_command("convert", "convert_command"), many="option")

    export = commands.add_parser("export", help="weights of a run as safetensors, with config and tokenizer")
    export.add_argument("run", help="a run folder or a checkpoint")
    export.add_argument("out", help="the new folder; attnzoo.load and init_from take it")
    export.set_defaults(command=_command("export", "export_command"))

    tokenize = commands.add_parser("tokenize", help="write text as shards of tokens, for data=tokens")
    tokenize.add_argument("out", help="the folder; finished shards in it are kept")
    tokenize.add_argument("option", nargs="*", help="as of train: data=text data.path=... tokenizer=bpe")
    tokenize.add_argument("--shard-tokens", type=int, default=100_000_000, help="training tokens of a shard")
    tokenize.add_argument("--processes", type=int, default=1, help="the result does not depend on it")
    tokenize.add_argument("--check", action="store_true", help="compare every shard with its checksum")
    tokenize.set_defaults(command=_command("tokenize", "tokenize_command"), many="option")

    doctor = commands.add_parser(
        "doctor", help="versions, devices, and which implementation each variant uses here"
    )
    doctor.set_defaults(command=_command("doctor", "doctor_command"))

    compare = commands.add_parser(
        "compare", help="runs side by side: attnzoo compare RUN... | sweep NAME | attention=mha,mla seeds=3"
    )
    compare.add_argument("runs", nargs="+", help="run folders; `sweep NAME`; or the arguments of a sweep")
    compare.add_argument("--baseline", help="the arm that all others are compared with")
    compare.add_argument("--out", help="folder of comparison.json, comparison.csv and report.html")
    compare.add_argument("--force", action="store_true", help="compare what is not comparable, and say so")
    compare.add_argument("--level", type=float, default=0.95, help="of the intervals and verdicts")
    compare.add_argument("--interval", default="t", help="t, bootstrap")
    compare.add_argument("--correction", default="holm", help="for several arms: holm, fdr_bh, none")
    compare.set_defaults(command=_command("compare", "compare_command"), many="runs")

    bench = commands.add_parser("bench", help="time the ops against SDPA, fla and plain torch")
    bench.add_argument("ops", nargs="*", help="scan, latent_decode, entmax; all without a name")
    bench.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    bench.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    bench.add_argument("--rounds", type=int, default=7)
    bench.add_argument("--out", default="benchmarks/results", help="folder of the CSV files")
    bench.set_defaults(command=_command("bench", "bench_command"), many="ops")
    return parser
