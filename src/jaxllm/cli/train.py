"""``jaxllm train``: a training run from a YAML file."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from jaxllm.cli import run_folder
from jaxllm.cli.errors import UserError

if TYPE_CHECKING:
    from jaxllm.cli.train_run import TrainRun


@dataclass(frozen=True)
class Args:
    """Train from a YAML file; a run folder's run.yaml goes on with it under --resume.

    Attributes:
        config: the YAML file; see --example.
        set: changes of its fields, as NAME=VALUE: --set optim.lr=3e-4 trainer.steps=500.
        init: a folder of a model to start from, instead of the file's model: Hugging Face's or a run's.
        context_parallel: how devices along mesh.context share documents, instead of the file's context.strategy: fcp,
            fcp-pairs, ring, zigzag, document or ulysses.
        out: the run's folder, instead of the file's.
        resume: go on from the newest checkpoint in the run's folder.
        profile: FROM:TO, steps to trace with jax.profiler, into the run's folder.
        failover: survive workers that die, under `jaxllm launch`: mecefo, exact or drop, what becomes of their rows.
        failover_rank: of the weight gradients of who does two jobs; a sixteenth of the model's width unless given.
        failover_refresh: steps after which the bases of these gradients are made anew.
        debug_nans: stop at the first operation that makes a NaN; slow.
        example: print a file to start from, and nothing else.
    """

    config: Positional[Path | None] = None
    set: tuple[str, ...] = ()
    init: Path | None = None
    context_parallel: str | None = None
    out: Path | None = None
    resume: bool = False
    profile: str | None = None
    failover: str | None = None
    failover_rank: int | None = None
    failover_refresh: int = 100
    debug_nans: bool = False
    example: bool = False


def parse_profile(text: str) -> tuple[int, int]:
    """FROM:TO as two steps.

    Raises:
        UserError: it is anything else.
    """
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(
            "--profile", text, "FROM:TO, two steps with FROM below TO", "For example: --profile 10:15"
        )
    return int(first), int(last)


def configure(args: Args) -> "TrainRun":
    """The run that the arguments describe.

    Raises:
        UserError, ConfigError: something in them or in the file cannot be used.
    """
    profile = None if args.profile is None else parse_profile(args.profile)
    if args.config is None:
        raise UserError(
            "config", None, "a YAML file", "`jaxllm train --example > run.yaml` writes one to start from."
        )
    from jaxllm.cli.train_run import read

    strategy = () if args.context_parallel is None else (f"context.strategy={args.context_parallel}",)
    run = read(args.config, (*args.set, *strategy), init=args.init)
    trainer = replace(
        run.trainer,
        profile=profile or run.trainer.profile,
        debug_nans=args.debug_nans or run.trainer.debug_nans,
    )
    run = replace(run, trainer=trainer, out=args.out or run.out)
    run_folder.check(run.out, "out")
    if int(os.environ.get("FAILOVER_RESTARTS", "0")):
        # Started again in the middle of its run: whatever the folder holds is of that.
        return run
    saved = (run.out / "checkpoints").is_dir()
    if saved and not args.resume:
        raise UserError(
            "out",
            str(run.out),
            "a folder without checkpoints",
            "Add --resume to go on with that run, or give another --out.",
        )
    if args.resume and not saved:
        raise UserError(
            "--resume",
            str(run.out),
            "a run folder with checkpoints",
            "There are none; leave --resume out to start.",
        )
    return run


def join_processes() -> None:
    """Join the run of several processes that a launcher has started, if one has.

    Raises:
        ConfigError: the launcher's environment cannot be used; names the variable.
    """
    from jaxllm.config import ConfigError
    from parallel.distributed import LaunchError, start

    try:
        start(os.environ)
    except LaunchError as error:
        raise ConfigError(str(error)) from error


def run(args: Args) -> int:
    """Train; the exit code is 130 after Ctrl-C, which saves first."""
    if args.example:
        from jaxllm.cli.train_run import example

        print(example(), end="")
        return 0
    supervised = "FAILOVER_SUPERVISOR" in os.environ
    if supervised != (args.failover is not None):
        allowed = "mecefo, exact or drop, in a command that `jaxllm launch` starts, and only there"
        hint = "For example: jaxllm launch --workers 4 -- jaxllm train run.yaml --failover mecefo"
        raise UserError("--failover", args.failover, allowed, hint)
    if args.failover is not None:
        return _run_supervised(args, args.failover)
    join_processes()
    configured = configure(args)
    from jaxllm.cli.train_session import train

    return train(configured)


def _run_supervised(args: Args, method: str) -> int:
    """Train as one of the workers of a supervisor."""
    from jaxllm.config import ConfigError
    from parallel.failover.membership import Member, MembershipError

    configured = configure(args)
    from jaxllm.cli.train_session import Supervised, train
    from jaxllm.train.failover import FailoverSettings
    from jaxllm.train.sharing import check_elastic

    settings = FailoverSettings(method, rank=args.failover_rank, refresh=args.failover_refresh)
    try:
        member = Member()
    except MembershipError as error:
        raise ConfigError(str(error)) from error
    check_elastic(configured.trainer, member.workers, configured.data.batch_size)
    return train(configured, Supervised(member, settings))
