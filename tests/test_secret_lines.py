"""Lines that libraries log, and warnings, say no secret of the environment: nowhere that a run writes to."""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings
from pathlib import Path

import pytest
from lightning.fabric.utilities import warnings as lightning_warnings

from attnzoo.cli import main
from attnzoo.redaction import redact_output
from attnzoo.train.module import LanguageModule
from children import run_child
from runs import overrides
from test_security import HOSTILE, LEFT, SECRET, said_in


class Sayer:
    """What a library might log: all that it says is a secret."""

    def __str__(self) -> str:
        return f"said {SECRET}"

    __repr__ = __str__


@pytest.fixture
def redacting(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as the command's own, for a test."""
    changed = [(logging.Handler, "format"), (logging.Handler, "handleError"), (warnings, "showwarning")]
    changed += [(sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")]
    for owner, name in changed:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    redact_output()
    monkeypatch.setenv("ZOO_API_KEY", SECRET)


@pytest.fixture
def logger(redacting: None) -> tuple[logging.Logger, io.StringIO]:
    """A logger of a library's own, and what it has written."""
    log, said = logging.Logger("library"), io.StringIO()
    log.addHandler(logging.StreamHandler(said))
    return log, said


@pytest.mark.parametrize(("secret", "text"), HOSTILE)
def test_a_record_says_no_secret(
    secret: str,
    text: object,
    logger: tuple[logging.Logger, io.StringIO],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As message, as argument, as error, and in a field of the format."""
    log, said = logger
    monkeypatch.setenv("ZOO_API_KEY", secret)
    log.handlers[0].setFormatter(logging.Formatter("%(message)s (%(field)s)"))
    log.warning(text, extra={"field": 1})
    log.warning("%s", text, extra={"field": 1})
    log.warning("n", extra={"field": text})
    try:
        raise LookupError(text)
    except LookupError:
        log.exception("failed", stack_info=True, extra={"field": 1})
    written = said.getvalue()
    assert written.count("***") >= 4 and "Traceback (most recent call last):" in written
    for part in LEFT:
        assert part not in written


def test_a_harmless_record_stays_as_it_is(logger: tuple[logging.Logger, io.StringIO]) -> None:
    log, said = logger
    seen: list[logging.LogRecord] = []
    log.addFilter(lambda record: bool(seen.append(record)) or True)
    log.warning("%d of %s", 3, SECRET)
    log.warning("%d of %s", 3, {"a": 1})
    assert said.getvalue() == "3 of ***\n3 of {'a': 1}\n"
    assert [record.msg for record in seen] == ["%d of %s"] * 2 and seen[0].args == (3, SECRET)


class Listing(logging.Formatter):
    """As those of handlers that send no text."""

    def format(self, record: logging.LogRecord) -> dict:
        return {"message": super().format(record), "level": record.levelno, "api_key": "abc"}


def test_a_formatter_need_not_make_text(redacting: None) -> None:
    handler = logging.Handler()
    handler.setFormatter(Listing())
    record = logging.LogRecord("library", 30, "file.py", 1, "at %s", (SECRET,), None)  # by no factory
    assert handler.format(record) == {"message": "at ***", "level": 30, "api_key": "***"}


def test_what_cannot_be_logged_says_no_secret(
    logger: tuple[logging.Logger, io.StringIO], capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python would print such a record as it is."""
    log, said = logger
    log.warning("%d seconds", SECRET)
    log.warning(f"%s and %s {SECRET}", 1)
    log.warning("%s and %s", {SECRET: Sayer()})
    said.close()
    log.warning("closed %s", Sayer())
    err = capfd.readouterr().err
    assert SECRET not in err and err.count("cannot log ") == 4 and err.count("Traceback") == 4
    assert "cannot log '%d seconds' with ('***',) at " in err and f"{Path(__file__).name}:" in err
    assert "ValueError: I/O operation on closed file" in err and "with (said ***,) at" in err
    monkeypatch.setattr(logging, "raiseExceptions", False)
    log.warning("closed %s", Sayer())
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setattr(sys, "stderr", None)
    log.warning("closed %s", Sayer())
    assert capfd.readouterr() == ("", "")


def test_a_warning_says_no_secret(
    redacting: None, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a library makes its text, or sends it to a log or a file."""
    warnings.simplefilter("always")
    inside = str(Path(lightning_warnings.__file__))
    for form in (warnings.formatwarning, lightning_warnings._custom_format_warning):
        monkeypatch.setattr(warnings, "formatwarning", form)
        warnings.warn(f"no room at {SECRET}", stacklevel=1)
        warnings.warn_explicit(f"asked https://me:pw@host for {SECRET}", UserWarning, inside, 3)
    err = capfd.readouterr().err
    assert SECRET not in err and "me:pw" not in err
    assert err.count("UserWarning: no room at ***") == 2
    assert err.count("asked https://***@host for ***") == 2 and f"{inside}:3: asked" in err  # Lightning's own
    file = io.StringIO()
    warnings.showwarning(f"told {SECRET}", UserWarning, "x.py", 3, file=file, line=f"key = {SECRET!r}")
    assert file.getvalue() == "x.py:3: UserWarning: told ***\n  key = '***'\n"
    logging.captureWarnings(True)
    try:
        warnings.warn(f"no room at {SECRET}", stacklevel=1)
    finally:
        logging.captureWarnings(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn(f"no room at {SECRET}", stacklevel=1)
    assert len(caught) == 1
    monkeypatch.setattr(sys, "stderr", None)
    warnings.warn("nowhere", stacklevel=1)
    assert SECRET not in "".join(capfd.readouterr())


def chatters(arguments: list[str]) -> None:
    """`attnzoo`, amid whose first step libraries say the secret."""
    step, before = LanguageModule.training_step, logging.getLogger("early")
    before.addHandler(logging.StreamHandler(sys.stdout))  # from before the command began
    logging.disable(logging.NOTSET)

    def says(self: LanguageModule, *args: object) -> object:
        for name in ("huggingface_hub", "fsspec.http", "early"):
            log = logging.getLogger(name)
            log.error(f"{name}: https://me:{SECRET}@host said {SECRET}")
            log.error("%s: argument %s", name, SECRET)
            log.error("%d", SECRET)
            try:
                raise LookupError(f"{name}: raised {SECRET}")
            except LookupError:
                log.exception("failed")
        warnings.warn(f"warned of {SECRET}", stacklevel=1)
        return step(self, *args)

    LanguageModule.training_step = says
    sys.argv = ["attnzoo", *arguments]
    sys.exit(main())


@pytest.mark.multi
@pytest.mark.parametrize("log", ["none", "default"])
def test_a_run_logs_no_secret(log: str, tmp_path: Path) -> None:
    """Neither on the terminal nor in Hydra's file of the job."""
    given = (f"hydra/job_logging={log}", f"hydra.run.dir={tmp_path / 'run'}", "trainer.max_steps=1")
    ended = run_child(
        chatters, ["train", *overrides(tmp_path, *given)], env={"ZOO_API_KEY": SECRET}, cwd=tmp_path
    )
    assert ended.returncode == 0, ended
    assert not said_in(tmp_path, ended.stdout, ended.stderr)
    assert "UserWarning: warned of ***" in ended.stderr
    texts = [ended.stdout + ended.stderr]
    if log == "default":
        texts.append((tmp_path / "run" / "train.log").read_text())
    for text in texts:
        for name in ("huggingface_hub", "fsspec.http", "early"):
            if name == "early" or log == "default" or name in text:
                assert f"{name}: https://***@host said ***" in text
                assert f"{name}: argument ***" in text and f"LookupError: {name}: raised ***" in text
